from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from maskft.data import Collator, Summary, check, open_image, read, to_dataset
from maskft.errors import DataError

from .helpers import MARKED, PLAIN, llava, make_processor, png, row, write_json


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor(PLAIN)


def flaws(*rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        check(to_dataset(rows), **options)
    return str(caught.value)


def roles(*names: str) -> dict[str, Any]:
    one = row()
    one["messages"] = [{"role": name, "content": [{"type": "text", "text": "x"}]} for name in names]
    return one


def test_summary(tmp_path: Path, processor: Any) -> None:
    a, b = png(tmp_path / "a.png"), png(tmp_path / "b.png")
    rows = [row("Q?", "A.", images=[a, b]), row("Q?", "A."), row("Q?", "A.", "Why?", "So.", images=[a])]
    assert check(to_dataset(rows)) == Summary(examples=3, images=3, text_only=1, longest=None)
    longest = max(Collator(processor)([one])["input_ids"].shape[1] for one in rows)
    got = check(to_dataset(rows), processor=processor, max_length=longest)
    assert got == Summary(examples=3, images=3, text_only=1, longest=longest)


def test_progress_wraps_the_rows() -> None:
    seen = []

    def progress(rows: Iterable[Any]) -> Iterable[Any]:
        for one in rows:
            seen.append(one["origin"])
            yield one

    check(to_dataset([row("Q?", "A.", origin=str(i)) for i in range(3)]), progress=progress)
    assert seen == ["0", "1", "2"]


def test_empty_and_foreign_datasets() -> None:
    with pytest.raises(DataError, match="The data set is empty"):
        check(to_dataset([]))
    with pytest.raises(DataError, match=r"has the columns \['text'\], but \['id', "):
        check(Dataset.from_dict({"text": ["x"]}))


def test_images(tmp_path: Path) -> None:
    png(tmp_path / "a.jpg")
    (tmp_path / "empty.png").touch()
    content = png(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:100])
    names = ("a.gif", "none.png", "empty.png", "cut.png", "whole.png")
    text = flaws(
        *(row("Q?", "A.", images=[tmp_path / name], origin=f"t.jsonl line {i}") for i, name in enumerate(names))
    )
    assert "The data has 4 flaw(s) in 5 rows:" in text
    assert f"t.jsonl line 0: image file {tmp_path}/a.gif does not exist, but a.jpg does. Name that file" in text
    assert f"t.jsonl line 1: image file {tmp_path}/none.png does not exist. Check image_root" in text
    assert f"t.jsonl line 2: image file {tmp_path}/empty.png is empty (0 bytes)" in text
    assert f"t.jsonl line 3: image file {tmp_path}/cut.png cannot be decoded" in text
    assert "embedded image cannot be decoded" in flaws(row("Q?", "A.", images=[content[:100]]))


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = png(tmp_path / "big.png", size=(64, 64))
    monkeypatch.setattr("maskft.data.images.MAX_PIXELS", 100)
    assert "has more than 100 pixels" in flaws(row("Q?", "A.", images=[path]))


def test_each_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("maskft.data.checks.open_image", lambda image: opened.append(image) or open_image(image))
    a, b = png(tmp_path / "a.png"), png(tmp_path / "b.png", "blue")
    check(to_dataset([row("Q?", "A.", images=[image]) for image in (a, b, a, a.read_bytes(), a.read_bytes())]))
    assert len(opened) == 3


def test_tokens_and_images_must_match(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    rows = [
        llava("What?", image="a.png"),
        llava("<image>\nWhat?"),
        llava("<image><image>", image="a.png"),
        llava("Hi", "an <image> here"),
    ]
    with pytest.raises(DataError) as caught:
        check(read(write_json(tmp_path / "t.json", rows)))
    text = str(caught.value)
    assert "t.json item 0: has 1 image(s) but no <image> token. Put <image> into a user turn." in text
    assert "t.json item 1: has 1 <image> token(s) but no image. Name the image file or remove the token." in text
    assert "t.json item 2: has 1 image(s) but 2 <image> token(s). Make the numbers equal." in text
    assert "t.json item 3: the image token '<image>' stands in a text part of the turn by assistant" in text


def test_image_in_an_answer(tmp_path: Path) -> None:
    one = row("Q?", "A.", images=[png(tmp_path / "a.png")])
    one["messages"][1]["content"].append(one["messages"][0]["content"].pop(0))
    assert "an image stands in a turn by assistant. Move it to a user turn." in flaws(one)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (row(), "has no messages. Add"),
        (roles("system"), "has a system turn only"),
        (roles("assistant", "user"), "the first turn is by assistant, but user is expected"),
        (roles("user", "user", "assistant"), "turn 2 is by user, but assistant is expected"),
        (roles("system", "user", "system", "assistant"), "turn 2 is by system, but assistant is expected"),
        (roles("system", "system", "user", "assistant"), "the first turn is by system, but user is expected"),
        (roles("user", "assistant", "user"), "the last turn is not the assistant's"),
        (row("Q?", " \n"), "turn 2, the answer by assistant, is empty, all its labels would be masked. Fill it in"),
        (row("", "A."), "turn 1, the question by user, is empty. Fill it in"),
    ],
)
def test_turns(one: dict[str, Any], message: str) -> None:
    assert f"a.json item 0: {message}" in flaws(one)


def test_flaws_are_gathered_and_counted() -> None:
    text = flaws(*(row("Q?", origin=f"t.json item {i}") for i in range(14)))
    assert "14 flaw(s) in 14 rows" in text
    assert "item 9:" in text
    assert "item 10:" not in text
    assert text.endswith("... and 4 more")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_max_length(tmp_path: Path, template: str) -> None:
    processor = make_processor(template)
    path = png(tmp_path / "a.png")
    one = row("shape?", "circle", "color?", "red", images=[path])
    batch = Collator(processor)([one])
    length = batch["input_ids"].shape[1]
    images = (batch["input_ids"][0] == processor.image_token_id).nonzero()
    cut = flaws(one, processor=processor, max_length=int(images[-1]))
    assert f"has {length} tokens, but max_length is {int(images[-1])}: image tokens would be cut off and all" in cut
    assert f"all answer labels would be cut off. Set max_length to at least {length}, or shorten" in cut
    only_labels = flaws(one, processor=processor, max_length=int(images[-1]) + 1)
    assert f"max_length is {int(images[-1]) + 1}: all answer labels would be cut off. Set" in only_labels
    some = flaws(one, processor=processor, max_length=length - 1)
    assert f"a.json item 0: has {length} tokens, but max_length is {length - 1}. Set max_length to at least" in some


def test_late_image_cut_off(tmp_path: Path, processor: Any) -> None:
    one = row("Hi", "yes", "shape?", "red", images=[png(tmp_path / "a.png")])
    one["messages"][2]["content"].insert(0, one["messages"][0]["content"].pop(0))
    ids = Collator(processor)([one])["input_ids"][0]
    last = int((ids == processor.image_token_id).nonzero()[-1])
    assert f"but max_length is {last}: image tokens would be cut off. Set" in flaws(
        one, processor=processor, max_length=last
    )


def test_template_without_answer_tokens() -> None:
    processor = make_processor(MARKED.replace("m.role == 'assistant'", "m.role == 'model'"))
    assert "a.json item 0: no token of it is an answer" in flaws(row("Q?", "A."), processor=processor)


def test_what_the_collator_refuses_is_a_flaw() -> None:
    processor = make_processor("{{ raise_exception('No system turns') }}")
    text = flaws(row("Q?", "A.", origin="t.json item 3"), processor=processor)
    assert "t.json item 3: The processor cannot encode t.json item 3: No system turns" in text


def test_image_token_of_the_processor_in_text(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "image_token", "<img>")
    assert "the image token '<img>' stands in a text part" in flaws(row("An <img>?", "A."), processor=processor)
