"""Answers in the playground are those of the base and of the masks; strength 0 and switched-off layers are the base."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskft.app.playground import BASE, LONGEST_QUESTION, MIXTURE, Blend, Playground, check_size
from maskft.data.schema import image_part, text_part, turn
from maskft.errors import DataError, UserError
from maskft.evaluation import generate_answers
from maskft.evaluation.candidates import Candidate, find_candidates, wearing
from maskft.gates import Soft, TopK
from maskft.recipe import ModelSection
from maskft.vlm.load import load_model, load_processor
from tests.evaluation.tiny import tiny_pair

QUESTION = "What color is it?"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pair(tmp_path_factory.mktemp("app"))
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def playground(place: Path) -> Playground:
    candidates = find_candidates(str(place / "base"), [str(place / "a"), str(place / "b")])
    return Playground(candidates, dtype="float32", max_new_tokens=8)


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, str]:
    """What base and masks say when asked one at a time."""
    picture = {"path": str(place / "red.png"), "bytes": None}
    row = {
        "id": "0",
        "images": [picture],
        "messages": [turn("user", [image_part(), text_part(QUESTION)])],
        "origin": "",
    }
    processor = load_processor(str(place / "base"))
    model = load_model(str(place / "base"), dtype="float32")
    said = {}
    for candidate in find_candidates(str(place / "base"), [str(place / "a"), str(place / "b")]):
        with wearing(model, candidate) as worn:
            said[candidate.name] = generate_answers(worn, processor, [row], batch_size=1, max_new_tokens=8)[0]
    assert len(set(said.values())) == 3
    return said


def final(playground: Playground, place: Path, **changes: object) -> dict[str, str]:
    asked = {
        "image": place / "red.png",
        "question": QUESTION,
        "names": ["a", "b"],
        "strength": 1.0,
        "on": playground.places,
    }
    return list(playground.answers(**{**asked, **changes}))[-1]  # type: ignore[arg-type]


def test_answers_are_those_of_base_and_masks(playground: Playground, place: Path, expected: dict[str, str]) -> None:
    said = final(playground, place)
    assert list(said) == [BASE, "a", "b"]
    assert said == expected
    assert final(playground, place, names=["b"]) == {"base": expected["base"], "b": expected["b"]}


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"on": []}])
def test_nothing_of_a_mask_is_the_base(
    changes: dict, playground: Playground, place: Path, expected: dict[str, str]
) -> None:
    assert set(final(playground, place, **changes).values()) == {expected["base"]}
    assert final(playground, place) == expected  # and everything is as before


def test_places(playground: Playground) -> None:
    assert playground.places == ["projector", "0", "1"]


def test_answers_grow(playground: Playground, place: Path) -> None:
    steps = list(playground.answers(place / "red.png", QUESTION, ["a"], 1.0, playground.places))
    assert len(steps) > 3
    assert all(later["base"].startswith(sooner["base"]) for sooner, later in pairwise(steps))
    assert "a" not in steps[0]


def test_a_reader_who_leaves_leaves_the_model_whole(
    playground: Playground, place: Path, expected: dict[str, str]
) -> None:
    stream = playground.answers(place / "red.png", QUESTION, ["a"], 0.5, playground.places)
    while "a" not in next(stream):
        pass
    stream.close()  # type: ignore[attr-defined]
    assert final(playground, place) == expected


def test_a_question_without_image(playground: Playground, place: Path) -> None:
    assert list(final(playground, place, image=None)) == [BASE, "a", "b"]


def test_mixtures(playground: Playground, place: Path, expected: dict[str, str]) -> None:
    told = playground.mix("interpolate", "a", "b", 1.0)
    assert told.startswith("interpolate of a and b (0.00 and 1.00)")
    assert playground.names == ["a", "b", MIXTURE]
    assert final(playground, place, names=[MIXTURE])[MIXTURE] == expected["b"]
    assert playground.mix("product", "a", "b", 0.5).startswith("product of a and b")
    assert playground.names == ["a", "b", MIXTURE]
    for arguments, message in (
        (("interpolate", "a", "a", 0.5), "two different"),
        (("union", "a", "b", 0.5), "hard masks"),
    ):
        with pytest.raises(UserError, match=message):
            playground.mix(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "  "}, "ask a question"),
        ({"question": "x" * (LONGEST_QUESTION + 1)}, "ask a question"),
        ({"names": ["c"]}, "there is no mask c"),
        ({"strength": 1.5}, "between 0 and 1"),
    ],
)
def test_mistakes(changes: dict, message: str, playground: Playground, place: Path) -> None:
    with pytest.raises(UserError, match=message):
        final(playground, place, **changes)


def test_a_generation_that_fails_is_told(playground: Playground, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(playground.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        final(playground, place)


def test_images_that_are_too_large_or_none(tmp_path: Path) -> None:
    Image.new("1", (5000, 4001)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"5000 x 4001 pixels; at most 20,000,000"):
        check_size(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match="not an image"):
        check_size(tmp_path / "text.png")


def test_blends() -> None:
    offset, weight = torch.randn(4, 4), torch.randn(4, 4)
    for gate in (Soft(0.9), TopK(0.5)):
        m = gate.value(offset, weight)
        assert torch.equal(Blend(gate, 0.0).value(offset, weight), torch.ones(4, 4))
        torch.testing.assert_close(Blend(gate, 1.0).value(offset, weight), m)
        torch.testing.assert_close(Blend(gate, 0.25).value(offset, weight), 0.75 + 0.25 * m)
        torch.testing.assert_close(Blend(gate, 0.5).derivative(offset, weight), gate.derivative(offset, weight) / 2)


def test_a_ranking_over_all_layers(place: Path, tmp_path: Path) -> None:
    from maskft import MaskConfig
    from maskft.tuner import attach

    config = MaskConfig(gate="topk", keep_ratio=0.5, ranking="global")
    attach(load_model(str(place / "base"), dtype="float32"), config).save_pretrained(tmp_path / "global")
    both = find_candidates(str(place / "base"), [str(tmp_path / "global")])
    one = Playground(both, dtype="float32", max_new_tokens=8)
    full, none = (final(one, place, names=["global"], strength=strength) for strength in (1.0, 0.0))
    assert none["global"] == none["base"] == full["base"] != full["global"]


def test_what_is_no_mask(place: Path) -> None:
    section = ModelSection(base=str(place / "base"))
    with pytest.raises(UserError, match="needs a mask"):
        Playground([Candidate("base", section)])
    with pytest.raises(UserError, match="x trained weights of the base"):
        Playground([Candidate("x", section, place, "projector.safetensors")])
