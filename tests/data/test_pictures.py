"""Labelled pictures: what is read of two packages' layouts, what is left out, and that no part shows another's."""

from __future__ import annotations

import io
import random
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from maskft.data import labels, pictures
from maskft.data.labels import read_clipart, read_stamps
from maskft.data.pictures import Labelled, gather_pictures
from maskft.data.questions import Asked, ask, guessed, report
from maskft.errors import DataError

ANIMALS = ("cat", "dog", "hen", "owl", "cow", "goat", "hare", "toad", "wolf", "bear", "lynx", "mole")
FRUIT = ("apple", "pear", "plum", "fig", "lemon", "melon", "peach", "grape", "mango", "kiwi", "lime", "date")


def drawing(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Some boxes on a transparent ground, other ones for each seed."""
    draw = random.Random(seed)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(9):
        x, y = draw.randrange(size[0] - 8), draw.randrange(size[1] - 8)
        shade = tuple(draw.randrange(220) for _ in range(3))
        pen.rectangle((x, y, x + draw.randrange(3, 14), y + draw.randrange(3, 14)), fill=(*shade, 255))
    return image


def save(file: Path, image: Image.Image) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def bomb(file: Path, width: int, height: int) -> None:
    """A PNG whose header promises more pixels than it holds."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x06\x00\x00\x00"

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def stamps(source: Path) -> Path:
    """A source folder in the layout of tuxpaint-stamps-default."""
    root = source / labels.STAMPS
    for number, (kind, name) in enumerate([("animals", n) for n in ANIMALS] + [("food", n) for n in FRUIT]):
        file = save(root / kind / "sorts" / f"{name}.png", drawing(number))
        article = "An" if name[0] in "ao" else "A"
        file.with_suffix(".txt").write_text(f"{article} {name}.\nde.utf8=Etwas.\n")
    return source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return stamps(tmp_path / "unpacked")


def label(name: str, kind: str | None = "animals", title: str | None = None, file: Path = Path()) -> Labelled:
    words = frozenset(re.findall("[a-z]+", f"{name} {title or ''}"))
    return Labelled(name, file, kind, title, f"Is there a {title}" if title else None, words)


@pytest.mark.parametrize(
    ("caption", "title", "phrase"),
    [
        ("A brown hen.", "brown hen", "Is there a brown hen"),
        ("An otter.", "otter", "Is there an otter"),
        ("A pair of shoes.", "shoes", "Is there a pair of shoes"),
        ("Some flowers.", "flowers", "Are there flowers"),
        ("The letter C.", "letter c", "Is there a letter c"),
        ("Anthurium", "anthurium", "Is there an anthurium"),
        ("A cat\u2019s eye.", "cat's eye", "Is there a cat's eye"),
        ("Boom!!!", None, None),
        ("Say cheese!", None, None),
        ("Bishop. Can only move diagonally.", None, None),
        ("A very small blue striped fish.", None, None),
        ("", None, None),
    ],
)
def test_captions(caption: str, title: str | None, phrase: str | None) -> None:
    article, said = labels._said(caption)
    assert (said, labels._phrase(said, article)) == (title, phrase)


def test_stamps_are_read(source: Path) -> None:
    root = source / labels.STAMPS
    save(root / "animals" / "cat_mirror.png", drawing(99))
    save(root / "naturalforces" / "wind.png", drawing(98))
    found = {one.name: one for one in read_stamps(source)}
    assert len(found) == 25
    hen = found["animals/sorts/hen"]
    assert (hen.kind, hen.title, hen.phrase) == ("animals", "hen", "Is there a hen")
    assert hen.words >= {"hen", "animals"}
    assert hen.series == "animals/sorts/hen"
    assert (found["naturalforces/wind"].kind, found["naturalforces/wind"].title) == ("natural forces", None)
    assert read_stamps(root)[0].name == found[min(found)].name  # the folder itself


def clipart(source: Path, name: str, title: str, *keywords: str) -> None:
    root = source / labels.CLIPART
    save(root / "png" / f"{name}.png", drawing(len(name)))
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    agent = "<dc:creator><cc:Agent><dc:title>A Person</dc:title></cc:Agent></dc:creator>"
    svg = root / "svg" / f"{name}.svg"
    svg.parent.mkdir(parents=True, exist_ok=True)
    svg.write_text(f"<svg><metadata>{agent}<dc:title>{title}</dc:title>{listed}</metadata></svg>")


def test_clipart_is_read(tmp_path: Path) -> None:
    clipart(tmp_path, "food/fruit/apple_jo_01", "Apple (red) 2", "fruit", "hash", "HASH(0x86)", "0x86f", "")
    clipart(tmp_path, "signs_and_symbols/stop", "Clipart by Somebody - clock12", "sign", "Salt &amp; pepper")
    clipart(tmp_path, "unsorted/tea_cup_jo", "The tea_cup", "hash")
    root = tmp_path / labels.CLIPART
    save(root / "png" / "lonely.png", drawing(1))
    save(root / "png" / "people" / "jo.png", drawing(2))  # without an SVG
    (root / "svg" / "people").mkdir()
    (root / "svg" / "people" / "jo.svg").write_text("<svg></svg>")
    found = {one.name: one for one in read_clipart(tmp_path)}
    assert found.keys() == {"food/fruit/apple_jo_01", "signs_and_symbols/stop", "unsorted/tea_cup_jo", "people/jo"}
    apple = found["food/fruit/apple_jo_01"]
    assert (apple.kind, apple.title, apple.phrase) == ("food", "apple", "Is there an apple")
    assert "hash" not in apple.words
    assert "person" not in apple.words
    stop = found["signs_and_symbols/stop"]
    assert (stop.kind, stop.title) == ("signs and symbols", None)
    assert stop.words >= {"salt", "pepper"}
    assert (found["unsorted/tea_cup_jo"].kind, found["unsorted/tea_cup_jo"].title) == (None, "tea cup")
    assert (found["people/jo"].kind, found["people/jo"].title) == ("people", None)
    (root / "svg" / "people" / "jo.svg").unlink()
    for number in range(pictures.SERIES + 1):
        clipart(tmp_path, f"food/pea_{number}", "Pea")
    found = {one.name: one for one in read_clipart(tmp_path)}
    assert len(found) == 4 + pictures.SERIES + 1
    assert (found["food/pea_1"].title, found["food/fruit/apple_jo_01"].title) == (None, "apple")


@pytest.mark.parametrize(("read", "package"), [(read_stamps, "tuxpaint"), (read_clipart, "openclipart-png")])
def test_a_source_without_pictures(read, package: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"does not hold usr/share/(.|\n)*apt-get download .*{package}"):
        read(tmp_path)
    (tmp_path / labels.STAMPS).mkdir(parents=True)
    (tmp_path / labels.CLIPART / "png").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no PNG files"):
        read(tmp_path)


def test_what_is_left_out(source: Path) -> None:
    root = source / labels.STAMPS
    save(root / "animals" / "sorts" / "zebra.png", drawing(0))  # the cat again
    save(root / "food" / "sorts" / "quince.png", drawing(1))  # the dog again, as food
    for number in range(pictures.SERIES + 3):
        save(root / "animals" / "sorts" / f"ant{number:02d}.png", drawing(200 + number))
    bomb(root / "food" / "huge.png", 30_000, 20_000)
    bomb(root / "food" / "large.png", 5_000, 4_000)
    (root / "food" / "torn.png").write_bytes((root / "food" / "sorts" / "fig.png").read_bytes()[:80])
    found = gather_pictures(read_stamps(source), validation=0.2, test=0.2)
    assert found.left_out == {
        "no label": 0,
        "long series": 3,
        "too large": 2,
        "unreadable": 1,
        "equal": 2,
    }
    assert found.unreadable == ["food/torn"]
    kept = {one.label.name: one.label for shown in found.parts.values() for one in shown}
    assert len(kept) == 24 + pictures.SERIES
    assert not kept.keys() & {"animals/sorts/zebra", "food/sorts/quince"}
    assert (kept["animals/sorts/cat"].kind, kept["animals/sorts/cat"].title) == ("animals", "cat")
    assert kept["animals/sorts/cat"].words >= {"cat", "zebra"}
    assert (kept["animals/sorts/dog"].kind, kept["animals/sorts/dog"].title) == (None, "dog")


def test_near_equal_pictures_and_series_stay_together(tmp_path: Path) -> None:
    labelled = []
    for number in range(12):
        image = drawing(number, (64, 48))
        paler = Image.eval(image.convert("RGB"), lambda value: min(255, value + 20))
        paler.putalpha(image.getchannel("A"))
        wide = Image.new("RGBA", (100, 90), (0, 0, 0, 0))
        wide.paste(image.resize((80, 60)), (15, 20))
        for place, shown in (("a", image), ("b", paler), ("c", wide)):  # three folders, so three series
            file = save(tmp_path / place / f"p{chr(97 + number)}.png", shown)
            labelled.append(label(f"{place}/p{chr(97 + number)}", "kind", file=file))
    labelled += [
        label(f"d/one_{n}", "kind", file=save(tmp_path / "d" / f"one_{n}.png", drawing(100 + n))) for n in range(4)
    ]
    found = gather_pictures(labelled, validation=0.25, test=0.25)
    part_of = {one.label.name: part for part, shown in found.parts.items() for one in shown}
    assert set(part_of.values()) == set(pictures.PARTS)
    for number in range(12):
        assert len({part_of[f"{place}/p{chr(97 + number)}"] for place in "abc"}) == 1
    assert len({part_of[f"d/one_{n}"] for n in range(4)}) == 1
    assert found.nearest <= pictures.NEAR
    again = gather_pictures(list(reversed(labelled)), validation=0.25, test=0.25)
    assert {one.label.name: part for part, shown in again.parts.items() for one in shown} == part_of
    other = gather_pictures(labelled, validation=0.25, test=0.25, seed=1)
    assert {one.label.name: part for part, shown in other.parts.items() for one in shown} != part_of


def test_pictures_are_small_and_on_white(source: Path) -> None:
    root = source / labels.STAMPS
    save(root / "food" / "sorts" / "wide.png", drawing(5, (400, 100)))
    save(root / "food" / "sorts" / "empty.png", Image.new("RGBA", (30, 30), (0, 0, 0, 0)))
    found = gather_pictures(read_stamps(source), validation=0.2, test=0.2, size=100)
    shown = {one.label.name: one for part in found.parts.values() for one in part}
    images = {name: Image.open(io.BytesIO(one.png)) for name, one in shown.items()}
    assert images["food/sorts/wide"].size == (100, 25)
    assert images["food/sorts/empty"].getcolors() == [(900, (255, 255, 255))]
    assert not shown["food/sorts/empty"].content.any()
    assert all(image.mode == "RGB" for image in images.values())


@pytest.mark.parametrize(
    ("shares", "message"),
    [((0.0, 0.2), "both must be above 0"), ((0.5, 0.5), "both must be above 0"), ((0.001, 0.2), "would be empty")],
)
def test_bad_shares(shares: tuple[float, float], message: str, tmp_path: Path) -> None:
    two = [label(f"a/x{n}", file=save(tmp_path / f"{n}.png", drawing(n))) for n in range(3)]
    with pytest.raises(DataError, match=message):
        gather_pictures(two, validation=shares[0], test=shares[1])


LABELS = [label(f"animals/{n}", "animals", n) for n in ANIMALS] + [label(f"food/{n}", "food", n) for n in FRUIT]
LABELS += [label(f"tools/{n}", "tools", None) for n in ("saw", "axe", "file", "rasp")]
LABELS += [label(f"town/{n}", "town", None) for n in ("bank", "shop", "park", "mill")]


def test_questions_are_balanced() -> None:
    asked = ask(LABELS)
    truth = {one.name: one for one in LABELS}
    for type_ in ("there", "belongs"):
        own = [one for one in asked if one.type == type_]
        answers = Counter((one.question, one.answer) for one in own)
        assert all(count == answers[question, "no"] for (question, said), count in answers.items() if said == "yes")
        assert len(own) == 2 * sum(one.answer == "yes" for one in own) > 0
    for one in asked:
        about = truth[one.picture]
        if one.type == "belongs":
            assert (one.answer == "yes") == (f'"{about.kind}"' in one.question)
        elif one.type == "there":
            assert (one.answer == "yes") == (f"a {about.title} in" in one.question)
        elif one.type == "what":
            assert one.answer == about.title
        else:
            right = about.kind if one.type == "kind" else about.title
            assert one.options["ABCD".index(one.answer)] == right
            assert len(set(one.options)) == 4
            assert all(
                f"\n{letter}. {option}\n" in one.question for letter, option in zip("ABCD", one.options, strict=True)
            )
    offered = Counter(option for one in asked if one.type == "name" for option in one.options)
    right = Counter(one.options["ABCD".index(one.answer)] for one in asked if one.type == "name")
    assert sum(offered.values()) == 4 * sum(right.values()) > 0
    assert ask(LABELS) == asked
    assert ask(LABELS, seed=1) != asked


def test_what_is_partly_true_is_not_asked_as_false() -> None:
    bear, polar, cub = label("a/x", "a", "bear"), label("a/y", "a", "polar bear"), label("a/bearcub", "a", "cub")
    assert not bear.words & {"polar"}
    from maskft.data.questions import _unlike

    assert not _unlike(polar, bear)
    assert not _unlike(bear, polar)  # it may be one
    assert not _unlike(cub, bear)  # the file's name says so
    assert _unlike(bear, label("a/z", "a", "cat"))
    assert not _unlike(label("a/cats", "a", "two cats"), label("a/z", "a", "cat"))
    assert _unlike(label("a/cartoon", "a", "toon"), label("a/z", "a", "car"))


def test_one_kind_only_leaves_nothing_to_choose_from() -> None:
    asked = ask([label(f"a/{n}", "animals", n) for n in ANIMALS[:3]])
    assert {one.type for one in asked} == {"what", "there"}
    assert ask([]) == []


def test_guesses_use_training_alone() -> None:
    train = [
        Asked("a", "what", "What?", "cat"),
        Asked("b", "what", "What?", "cat"),
        Asked("c", "what", "Which?", "dog"),
        Asked("d", "kind", "Kind?", "B", ("x", "y", "z", "w")),
        Asked("e", "kind", "Kind!", "C", ("x", "z", "y", "w")),
    ]
    asked = [
        Asked("f", "what", "What?", "dog"),
        Asked("g", "what", "New?", "cat"),
        Asked("h", "kind", "Kind again", "A", ("y", "x", "v", "u")),
        Asked("i", "there", "Is there?", "yes"),
    ]
    assert guessed(train, asked) == ["cat", "cat", "A", ""]
    found = report({"train": train, "test": asked})
    assert found["test"]["what"] == {"questions": 2, "pictures": 2, "guessed": 0.5, "answers_in_training": 1.0}
    assert found["test"]["kind"] == {"questions": 1, "pictures": 1, "chance": 0.25, "guessed": 1.0}
    assert found["train"]["kind"] == {"questions": 2, "pictures": 2, "chance": 0.25}
