import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from maskft.data import IGNORED, Collator, answer, prompt, to_dataset
from maskft.errors import DataError

from .helpers import IMAGE_TOKENS, MARKED, PLAIN, make_processor, png, row

BREAKING = PLAIN.replace("{{ p.text }}", "{{ p.text if loop.last and m == messages[-1] else p.text | upper }}")


@pytest.fixture(scope="module")
def plain() -> Any:
    return make_processor(PLAIN)


@pytest.fixture(scope="module")
def marked() -> Any:
    return make_processor(MARKED)


def learned(processor: Any, batch: dict[str, Any], number: int = 0) -> str:
    labels = batch["labels"][number]
    return str(processor.tokenizer.decode(labels[labels != IGNORED]))


def conversations(tmp_path: Path) -> list[dict[str, Any]]:
    red, blue = png(tmp_path / "red.png"), png(tmp_path / "blue.png", "blue", size=(40, 30))
    several = row("What color?", "red", "And the shape?", "a\ncircle\n", "Sure?", " yes ", images=[red, blue])
    later = row("Hello", "user yes", "Is it <b>red</b>?", "no", images=[])
    later["messages"][2]["content"].insert(0, {"type": "image", "text": None})
    later["images"] = [{"path": None, "bytes": blue.read_bytes()}]
    system = row("Color?", "red", images=[red])
    system["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    return [several, later, row("No image here", "yes"), system]


def test_markers_and_prefixes_give_equal_batches(tmp_path: Path, plain: Any, marked: Any) -> None:
    rows = conversations(tmp_path)
    for chosen in (rows, rows[::-1], rows[2:3], [rows[2], rows[0]], rows[:1]):
        with_prefixes, with_markers = Collator(plain)(chosen), Collator(marked)(chosen)
        assert set(with_prefixes) == set(with_markers)
        for key, value in with_prefixes.items():
            torch.testing.assert_close(value, with_markers[key], rtol=0, atol=0)


def test_labels_are_the_answers_with_end_of_turn(tmp_path: Path, plain: Any) -> None:
    batch = Collator(plain)(conversations(tmp_path))
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert learned(plain, batch, 0) == "red<|im_end|>a\ncircle\n<|im_end|> yes <|im_end|>"
    assert learned(plain, batch, 1) == "user yes<|im_end|>no<|im_end|>"
    assert learned(plain, batch, 2) == "yes<|im_end|>"
    assert learned(plain, batch, 3) == "red<|im_end|>"
    used = labels != IGNORED
    assert torch.equal(labels[used], ids[used])
    assert not (used & (mask == 0)).any()
    assert not (used & (ids == plain.image_token_id)).any()
    assert (ids == plain.image_token_id).sum(1).tolist() == [2 * IMAGE_TOKENS, IMAGE_TOKENS, 0, IMAGE_TOKENS]
    assert batch["pixel_values"].shape == (4, 3, 28, 28)
    assert mask[2, 0] == 1  # padded on the right
    assert mask[2, -1] == 0


def test_text_only_batch(plain: Any) -> None:
    batch = Collator(plain)([row("Hello", "yes"), row("Hello there you", "no")])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert [learned(plain, batch, i) for i in (0, 1)] == ["yes<|im_end|>", "no<|im_end|>"]


def test_rows_of_a_dataset(tmp_path: Path, plain: Any) -> None:
    rows = conversations(tmp_path)
    first, second = Collator(plain)(rows), Collator(plain)([*to_dataset(rows)])
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_batch_equals_single_rows(tmp_path: Path, marked: Any) -> None:
    rows = conversations(tmp_path)
    batch = Collator(marked)(rows)
    for number, one in enumerate(rows):
        single = Collator(marked)([one])
        length = single["labels"].shape[1]
        assert torch.equal(batch["labels"][number, :length], single["labels"][0])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_default_template_of_several(tmp_path: Path, template: str) -> None:
    processor = make_processor(None)
    processor.chat_template = {"default": template, "other": "x"}
    assert learned(processor, Collator(processor)([row("Hi", "yes")])) == "yes<|im_end|>"


def test_image_token_in_an_answer_is_not_learned(tmp_path: Path, plain: Any, marked: Any) -> None:
    one = row("Draw it", "so ", images=[png(tmp_path / "a.png")])
    one["messages"][1]["content"].append(one["messages"][0]["content"].pop(0))
    for processor in (plain, marked):
        assert learned(processor, Collator(processor)([one])) == "so <|im_end|>"


def test_whitespace_stays_without_an_end_of_turn_token(plain: Any) -> None:
    processor = make_processor(PLAIN.replace("<|im_end|>", "##"))
    assert learned(processor, Collator(processor)([row("Hi", "yes")])) == "yes##\n"


def test_longer_than_max_length(tmp_path: Path, plain: Any) -> None:
    rows = conversations(tmp_path)
    length = Collator(plain)(rows[:1])["input_ids"].shape[1]
    Collator(plain, max_length=length)(rows)
    rows[0]["origin"] = "b.json item 4"
    remedy = (
        rf"b\.json item 4: has {length} tokens, but max_length is {length - 1}\. Set max_length to at least {length}"
    )
    with pytest.raises(DataError, match=remedy):
        Collator(plain, max_length=length - 1)(rows)
    with pytest.raises(DataError, match=r"has \d+ tokens, but max_length is 3"):
        Collator(plain, max_length=3).prompts(rows)


def test_template_that_rewrites_earlier_turns() -> None:
    collator = Collator(make_processor(BREAKING))
    with pytest.raises(DataError, match=r"c\.json item 1: the chat template renders .*generation.* markers"):
        collator([row("yes", "no", "red", "no", origin="c.json item 1")])


def test_processor_errors_name_the_rows() -> None:
    processor = make_processor("{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"cannot encode a\.json item 0, a row: System role not supported"):
        Collator(processor)([row("Hi", "yes"), {**row("Hi", "yes"), "origin": None, "id": None}])
    with pytest.raises(DataError, match="The batch has no rows"):
        Collator(processor)([])


def test_image_errors_name_the_row(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(DataError, match=r"a\.json item 0: image file .*none\.png does not exist"):
        Collator(plain)([row("Hi", "yes", images=[tmp_path / "none.png"])])
    one = row("Hi", "yes", images=[png(tmp_path / "a.png")])
    one["messages"][0]["content"].pop(0)
    with pytest.raises(DataError, match=r"has 1 image\(s\) but 0 image part\(s\)"):
        Collator(plain)([one])


def test_unusable_processors() -> None:
    with pytest.raises(DataError, match="no chat template"):
        Collator(make_processor(None))
    with pytest.raises(DataError, match=r"no padding token\. Set tokenizer\.pad_token"):
        Collator(make_processor(pad=False))
    with pytest.raises(DataError, match="max_length is 0, but must be at least 1"):
        Collator(make_processor(), max_length=0)


def test_prompts_are_left_padded(tmp_path: Path, plain: Any) -> None:
    rows = conversations(tmp_path)
    side = plain.tokenizer.padding_side
    batch = Collator(plain).prompts(rows)
    assert "labels" not in batch
    assert plain.tokenizer.padding_side == side
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1, 1]
    assert batch["attention_mask"][2, 0] == 0
    ends = [plain.tokenizer.decode(ids).rsplit("<|im_end|>", 1) for ids in batch["input_ids"]]
    assert {end for _, end in ends} == {"\n<|im_start|>assistant\n"}
    assert ends[0][0].endswith("a\ncircle\n<|im_end|>\n<|im_start|>user\nSure?")
    full = Collator(plain)(rows)
    for number in range(len(rows)):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        assert torch.equal(ids, full["input_ids"][number, : len(ids)])
    assert batch["pixel_values"].shape == full["pixel_values"].shape


def test_prompt_and_answer() -> None:
    one = row("Hi", "yes", "Sure?", " no ")
    assert [message["role"] for message in prompt(one)] == ["user", "assistant", "user"]
    assert answer(one) == " no "
    asked = row("Hi", "yes", "Sure?")
    assert prompt(asked) == asked["messages"]
    with pytest.raises(DataError, match=r"a\.json item 0: the last turn is not the assistant's"):
        answer(asked)


def test_collator_can_be_sent_to_workers(plain: Any) -> None:
    collator = pickle.loads(pickle.dumps(Collator(plain, max_length=50)))
    assert learned(plain, collator([row("Hi", "yes")])) == "yes<|im_end|>"
