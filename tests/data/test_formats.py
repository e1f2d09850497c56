from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image, List

from maskft.data import COLUMNS, FEATURES, open_image, read, to_dataset
from maskft.errors import DataError

from .helpers import llava, png, row, write_json

IMAGE = {"type": "image", "text": None}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat(content: Any = "What?", answer: Any = "A cat.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def first_content(path: Path, item: dict[str, Any]) -> list[dict[str, Any]]:
    return list(read(write_json(path, [item]))[0]["messages"][0]["content"])


@pytest.mark.parametrize(("suffix", "place"), [(".json", "item 1"), (".jsonl", "line 2")])
def test_llava_file(tmp_path: Path, suffix: str, place: str) -> None:
    file = write_json(tmp_path / f"train{suffix}", [llava("Hello"), llava(image="sub/a.png", id=7)])
    dataset = read(file)
    assert tuple(dataset.column_names) == COLUMNS
    assert dataset.features == FEATURES
    assert dataset[0]["images"] == []
    assert dataset[1] == {
        "id": "7",
        "images": [{"path": str(tmp_path / "sub/a.png"), "bytes": None}],
        "messages": [
            {"role": "user", "content": [IMAGE, said("What?")]},
            {"role": "assistant", "content": [said("A cat.")]},
        ],
        "answers": None,
        "origin": f"train{suffix} {place}",
    }


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, said("What?")]),
        ("What?\n<image>", [said("What?"), IMAGE]),
        ("<image>\n<image>\nDiffer?", [IMAGE, IMAGE, said("Differ?")]),
        ("From\n<image>\nto <image>.", [said("From"), IMAGE, said("to "), IMAGE, said(".")]),
        ("<image>\n\nWhat?", [IMAGE, said("\nWhat?")]),
        ("What?", [said("What?")]),
    ],
)
def test_llava_markers(tmp_path: Path, value: str, parts: list[dict[str, Any]]) -> None:
    assert first_content(tmp_path / "a.json", llava(value, image=["a.png"])) == parts


def test_llava_system_turn_and_null_image(tmp_path: Path) -> None:
    item = {"image": None, "conversations": [{"from": "system", "value": "Be brief."}, *llava("Hi")["conversations"]]}
    got = read(write_json(tmp_path / "a.json", [item]))[0]
    assert [message["role"] for message in got["messages"]] == ["system", "user", "assistant"]
    assert (got["id"], got["images"]) == ("0", [])


def test_marker_in_an_answer_stays_text(tmp_path: Path) -> None:
    got = read(write_json(tmp_path / "a.json", [llava("Hi", "An <image> tag")]))[0]
    assert got["messages"][1]["content"] == [said("An <image> tag")]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("What?", [IMAGE, IMAGE, said("What?")]),
        ("A <image> or <image>?", [said("A "), IMAGE, said(" or "), IMAGE, said("?")]),
        ([said("A"), {"type": "image"}, {"type": "image"}], [said("A"), IMAGE, IMAGE]),
    ],
)
def test_messages_content(tmp_path: Path, content: Any, parts: list[dict[str, Any]]) -> None:
    assert first_content(tmp_path / "a.jsonl", chat(content, images=["a.png", "b.png"])) == parts


def test_messages_single_image(tmp_path: Path) -> None:
    got = read(write_json(tmp_path / "a.json", [chat(image="a.png")]))[0]
    assert got["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None}]
    got = read(write_json(tmp_path / "a.json", [chat(images=[{"path": "a.png"}])]))[0]
    assert got["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None}]


def test_parquet_with_bytes(tmp_path: Path) -> None:
    content = png(tmp_path / "a.png").read_bytes()
    table = pa.Table.from_pylist([chat(images=[{"bytes": content, "path": "x.png"}]), chat(images=None)])
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = read(tmp_path / "x.parquet")
    assert dataset[0]["images"] == [{"path": None, "bytes": content}]
    assert dataset["origin"][:] == ["x.parquet row 0", "x.parquet row 1"]


@pytest.mark.parametrize("many", [True, False])
def test_saved_folder_with_image_feature(tmp_path: Path, many: bool) -> None:
    path = str(png(tmp_path / "a.png", "blue"))
    data = Dataset.from_list([chat(**({"images": [path]} if many else {"image": path}))])
    data = data.cast_column("images" if many else "image", List(Image()) if many else Image())
    data.save_to_disk(str(tmp_path / "saved"))
    got = read(tmp_path / "saved")[0]
    assert got["origin"] == "saved row 0"
    assert open_image(got["images"][0]).getpixel((0, 0)) == (0, 0, 255)


def test_canonical_rows_survive_saving(tmp_path: Path) -> None:
    data = to_dataset([row("Q?", "A.", images=[png(tmp_path / "a.png")])])
    data.save_to_disk(str(tmp_path / "saved"))
    again = read(tmp_path / "saved")[0]
    assert {**again, "origin": ""} == {**data[0], "origin": ""}


def test_many_rows_pass_chunks(tmp_path: Path) -> None:
    assert len(to_dataset((row("Q?", "A.") for _ in range(7)), chunk=3)) == 7


def test_format_can_be_forced(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", [{**llava("Hi"), **chat("Ho")}])
    with pytest.raises(DataError, match=r"a\.json item 0: has both .*Choose with format"):
        read(file)
    for name, text in (("llava", "Hi"), ("messages", "Ho")):
        assert read(file, format=name)[0]["messages"][0]["content"] == [said(text)]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'lava', but must be .* Did you mean 'llava'"):
        read(file, format="lava")  # type: ignore[arg-type]


def test_image_root(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    file = write_json(tmp_path / "a.json", [llava(image="a.png")])
    path = read(file, image_root=tmp_path / "pics")[0]["images"][0]["path"]
    assert path == str(tmp_path / "pics" / "a.png")
    with pytest.raises(DataError, match=r"image_root .*none is not a folder\. Give"):
        read(file, image_root=tmp_path / "none")


@pytest.mark.parametrize("given", ["/etc/passwd", "../a.png", "sub/../../a.png", "link.png", "linked/a.png", "..", "."])
def test_paths_must_stay_below_the_root(tmp_path: Path, given: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = png(tmp_path / "a.png")
    (root / "link.png").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    file = write_json(root / "a.json", [llava(image=given)])
    with pytest.raises(DataError, match=r"a\.json item 0: image path .* outside the image root .*Move the file"):
        read(file)


def test_links_and_absolute_paths_inside_the_root_are_fine(tmp_path: Path) -> None:
    inside = png(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(inside)
    file = write_json(tmp_path / "a.json", [llava(image=[str(inside), "link.png", "x/../a.png"])])
    assert {image["path"] for image in read(file)[0]["images"]} == {str(inside)}


BAD_ROWS = [
    (llava(image="http://a.b/c.png"), "is a web address. Download it"),
    (llava(image=""), "is empty or has a null byte"),
    (llava(image="a\0.png"), "is empty or has a null byte"),
    (llava(image=3), "image: is int ('3'), but a path"),
    (llava(image=["a.png", None]), "image[1]: is null, but a path"),
    (llava(imgae="a.png"), "has '<image>' but no key 'image'. Did you mean 'image' by 'imgae'?"),
    (llava(id=1.5), "'id' is a float"),
    (llava(id=True), "'id' is a bool"),
    (llava("\ud800"), "conversations[0]: 'value' is not valid Unicode"),
    ({"id": "1", "conversation": []}, "has no key 'conversations'; its keys are ['conversation', 'id']"),
    ({"conversations": "Hi"}, "'conversations' is str ('Hi'), but must be a list."),
    ({"conversations": ["Hi"]}, "conversations[0]: is str ('Hi'), but an object is needed"),
    ({"conversations": [{"form": "human", "value": "Hi"}]}, "Did you mean 'from' by 'form'?"),
    ({"conversations": [{"from": "user", "value": "Hi"}]}, "'from' is 'user', but must be one of human, gpt, system."),
    ({"conversations": [{"from": "humen", "value": "Hi"}]}, "Did you mean 'human'?"),
    ({"conversations": [{"from": "human", "value": None}]}, "'value' is null, but must be a string."),
    (chat(role=1, images=["a"], image="b"), "has both 'images' and 'image'. Keep one"),
    (chat(images=[{"bytes": "AAAA"}]), "images[0]: 'bytes' is str, not binary. JSON holds paths only."),
    (chat(images=[{"file": "a.png"}]), "images[0]: has the keys ['file'], but neither 'path' nor 'bytes'"),
    (chat("<image>", imags=["a.png"]), "Did you mean 'images' by 'imags'?"),
    (chat([{"type": "image", "image": "a.png"}]), "given inside the part ('image'). List it under 'images'."),
    (chat([{"type": "video"}]), "messages[0], part 0: 'type' is 'video', but must be one of image, text."),
    (chat([{"type": "text"}]), "messages[0], part 0: has no key 'text'"),
    (chat(["Hi"]), "messages[0], part 0: is str ('Hi'), but an object"),
    (chat(None), "messages[0]: 'content' is null, but must be a string or a list."),
    ({"messages": [{"role": "asistant", "content": "Hi"}]}, "Did you mean 'assistant'?"),
    ({"messages": [{"roles": "user", "content": "Hi"}]}, "Did you mean 'role' by 'roles'?"),
    (["Hi"], "is a list, but an object is needed."),
]


@pytest.mark.parametrize(("item", "message"), BAD_ROWS)
def test_bad_rows(tmp_path: Path, item: Any, message: str) -> None:
    kind = "messages" if "messages" in item else "llava"
    for name, place in (("a.json", "a.json item 0: "), ("a.jsonl", "a.jsonl line 1: ")):
        with pytest.raises(DataError) as caught:
            read(write_json(tmp_path / name, [item]), format=kind)  # type: ignore[arg-type]
        assert place in str(caught.value)
        assert message in str(caught.value)


def test_bad_rows_are_gathered(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.jsonl", [llava("Hi"), *[llava(image="/etc/x")] * 12])
    with file.open("a") as out:
        out.write("\n{broken\n")
    with pytest.raises(DataError) as caught:
        read(file)
    text = str(caught.value)
    assert "13 bad row(s) (lines are counted from 1)" in text
    assert "line 2" in text
    assert "... and 3 more" in text
    assert "line 12" not in text


def test_malformed_lines_and_blank_lines(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.jsonl", [llava("Hi")])
    file.write_text("\ufeff\n" + file.read_text() + "\n\n", encoding="utf-8")
    assert read(file)[0]["origin"] == "a.jsonl line 2"
    file.write_text('{"id": 1\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 1: is not valid JSON"):
        read(file)
    file.write_text("[\n")
    with pytest.raises(DataError, match=r"Name a file that holds one list \.json"):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", r"a\.json is not valid JSON .*Repair the file"),
        ("a.json", "{}\n{}", r"Name a file with an object per line \.jsonl"),
        ("a.json", '{"data": []}', r"holds a dict with the keys \['data'\], but a list"),
        ("a.json", "3", r"holds a int, but a list"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.jsonl", "\n", r"a\.jsonl holds no rows"),
        ("a.json", '[{"question": "Hi"}]', r"a\.json item 0: has the keys \['question'\], but 'conversations'"),
        ("a.json", '[{"mesages": []}]', r"Did you mean 'messages'\?"),
        ("a.jsnl", "{}", r"ends in '\.jsnl', but must end in .*Did you mean '\.jsonl'"),
        ("data", "{}", r"ends in '', but must end in"),
        ("a.parquet", "PAR1", r"a\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_and_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json does not exist\. Check"):
        read(tmp_path / "none.json")
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_bytes(b'["\xff"]')
        with pytest.raises(DataError, match="is not UTF-8 text"):
            read(tmp_path / name)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder without state\.json"):
        read(tmp_path)
    data = Dataset.from_list([chat()])
    DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"DatasetDict with the splits \['test', 'train'\]\. Give the folder"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "train")) == 1
    for file in (tmp_path / "both" / "test").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DataError, match="cannot be loaded as a saved dataset"):
        read(tmp_path / "both" / "test")
