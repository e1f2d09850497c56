"""The adapter for lmms-eval on a tiny model. lmms-eval itself is stood in for by the class its models derive from."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskft.data import Collator
from maskft.errors import AdapterError, MissingExtraError, UserError
from maskft.evaluation import generate_answers
from maskft.whole import find_projector

from .tiny import tiny_adapter, tiny_base

MODULE = "maskft.evaluation.lmms"
DOCUMENTS = [
    {"color": "red", "ask": "What color?"},
    {"color": "blue", "ask": "What?"},
    {"color": "red", "ask": "What?"},
]
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1}


class Request(NamedTuple):
    """The one field of lmms-eval's Instance that models read."""

    args: tuple[Any, ...]


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str


class Lmms:
    """What the adapter takes from lmms-eval's base class."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The adapter's module, imported beside the stand-in."""
    for name, content in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.model", {"lmms": Lmms}),
        ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": Manifest}),
    ):
        stub = types.ModuleType(name)
        stub.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lmms")
    base = tiny_base(folder / "base")
    return base, tiny_adapter(base, folder / "adapter")


@pytest.fixture
def model(module: types.ModuleType, folders: tuple[Path, Path]) -> Any:
    loaded = module.MaskedModel(pretrained=str(folders[1]), dtype="float32", batch_size="2", device="cpu")
    loaded.task_dict = {"task": {"test": DOCUMENTS}}
    return loaded


def shown(document: dict[str, str]) -> list[Image.Image]:
    return [Image.new("RGB", (28, 28), document["color"])]


def ask(number: int, settings: dict[str, Any] | None = None, visuals: Any = shown) -> Request:
    return Request((DOCUMENTS[number]["ask"], dict(settings or SETTINGS), visuals, number, "task", "test"))


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    made = []
    for number, document in enumerate(DOCUMENTS):
        path = tmp_path / f"{number}.png"
        shown(document)[0].save(path)
        content = [{"type": "image", "text": None}, {"type": "text", "text": document["ask"]}]
        images = [{"path": str(path), "bytes": None}]
        made.append({"images": images, "messages": [{"role": "user", "content": content}]})
    return made


def test_without_lmms_eval_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskft\[lmms-eval\]'"):
        importlib.import_module(MODULE)


def test_the_manifest_names_the_class(module: types.ModuleType) -> None:
    found = module.manifest()
    assert found.model_id == "maskft"
    home, name = found.simple_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(home), name) is module.MaskedModel
    assert issubclass(module.MaskedModel, Lmms)


def test_answers_are_those_of_maskft_itself(model: Any, tmp_path: Path) -> None:
    expected = generate_answers(model.model, model.processor, rows(tmp_path), batch_size=1, max_new_tokens=6)
    assert model.generate_until([ask(n) for n in range(3)]) == expected
    assert model.generate_until([ask(n) for n in (2, 0, 1)]) == [expected[n] for n in (2, 0, 1)]


def test_each_request_has_its_own_settings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    generate = model.model.generate

    def spy(**arguments: Any) -> Any:
        calls.append((len(arguments["input_ids"]), arguments["max_new_tokens"], arguments["do_sample"]))
        return generate(**arguments)

    monkeypatch.setattr(model.model, "generate", spy)
    warm = {"max_new_tokens": 2, "temperature": 0.7, "top_p": 0.9}
    assert len(model.generate_until([ask(0), ask(1, warm), ask(2), ask(0)])) == 4
    assert calls == [(2, 6, False), (1, 6, False), (1, 2, True)]


def test_until_ends_an_answer(model: Any) -> None:
    (whole,) = model.generate_until([ask(0)])
    assert len(whole) > 3
    end = whole[2]
    cut = whole[: whole.index(end)].strip()
    assert model.generate_until([ask(0, {**SETTINGS, "until": end})]) == [cut]
    assert model.generate_until([ask(0, {**SETTINGS, "until": ["\0", "", end]})]) == [cut]


def test_likelihood_against_the_labels_of_training(model: Any, tmp_path: Path) -> None:
    row = rows(tmp_path)[0]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    batch = Collator(model.processor)([{**row, "messages": [*row["messages"], reply]}])
    labelled = batch["labels"][0] != -100
    positions = labelled.nonzero()[:-1, 0]  # without the end of turn
    with torch.no_grad():
        logits = model.model(**{name: t for name, t in batch.items() if name != "labels"}).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[positions - 1], batch["input_ids"][0][positions])
    found = model.loglikelihood([Request(("What color?", " red", shown, 0, "task", "test"))])
    assert found[0][0] == pytest.approx(expected.item(), abs=1e-5)
    (by_document,) = model.loglikelihood([Request(("What color?", lambda d: d["color"], shown, 0, "task", "test"))])
    assert by_document == found[0]


def test_the_greedy_answer_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is sure of every token of the text but the mistaken ones, whose successor it expects."""
    words = len(model.processor.tokenizer)

    def sure(mistakes: int) -> Any:
        def forward(**inputs: Any) -> Any:
            ids = inputs["input_ids"].roll(-1, dims=1)  # each position's next token
            ids[:, -1 - mistakes : -1] += 1
            return types.SimpleNamespace(logits=9.0 * torch.nn.functional.one_hot(ids % words, words))

        return forward

    request = Request(("What color?", "xyz", shown, 0, "task", "test"))
    right = math.log(math.exp(9) + words - 1) - 9
    for mistakes in (0, 1, 2):
        monkeypatch.setattr(model, "model", sure(mistakes))
        ((loss, greedy),) = model.loglikelihood([request])
        assert loss == pytest.approx(right + 9 * mistakes / 3, abs=1e-4)
        assert greedy == (mistakes == 0)


def test_an_answer_without_text_has_no_likelihood(model: Any) -> None:
    with pytest.raises(UserError, match="without text"):
        model.loglikelihood([Request(("What?", " ", shown, 0, "task", "test"))])


def test_rounds_go_on_until_the_task_ends_them(model: Any) -> None:
    seen = []

    def following(document: dict[str, str], *, previous_output: list[str], round_idx: int, previous_round_info: Any):
        seen.append((round_idx, list(previous_output), previous_round_info))
        return shown(document), f"Again: {previous_output[-1]}", round_idx == 2, previous_output, "info"

    request = Request(("What color?", SETTINGS, shown, following, 0, "task", "test"))
    (answers,) = model.generate_until_multi_round([request])
    assert len(answers) == 2
    assert [answers[0]] == model.generate_until([ask(0)])
    assert seen == [(1, answers[:1], None), (2, answers, "info")]


def test_marks_in_the_text_place_the_images(module: types.ModuleType) -> None:
    def kinds(context: str, count: int) -> list[str]:
        row = module._row(context, [Image.new("RGB", (2, 2))] * count)
        assert len(row["images"]) == count
        return [part["text"] or "image" for part in row["messages"][0]["content"]]

    assert kinds("What?", 2) == ["image", "image", "What?"]
    assert kinds("From <image>\nto <image> what?", 2) == ["From ", "image", "to ", "image", " what?"]
    assert kinds("<image> <image> What?", 1) == ["image", "What?"]  # as many marks as pictures, or none count
    assert kinds("<image> What?", 0) == ["What?"]


def test_pictures_keep_their_content(module: types.ModuleType, tmp_path: Path) -> None:
    from maskft.data import open_image

    for mode, color in (("RGB", (9, 8, 7)), ("L", 77), ("CMYK", (0, 255, 255, 0)), ("RGBA", (1, 2, 3, 255))):
        picture = Image.new(mode, (3, 2), color)
        opened = open_image(module._image(picture))
        assert opened.getpixel((0, 0)) == picture.convert("RGB").getpixel((0, 0))
    assert module._image(str(tmp_path / "a.png"))["path"] == str(tmp_path / "a.png")
    for other in ("film.MP4", 3):
        with pytest.raises(UserError, match="only pictures"):
            module._image(other)


def test_a_base_alone_and_its_projector(module: types.ModuleType, folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = module.MaskedModel(pretrained=str(folders[0]))
    assert base.model.dtype == torch.bfloat16
    state = {name: torch.zeros_like(t) for name, t in find_projector(base.model).state_dict().items()}
    save_file(state, tmp_path / "projector.safetensors")
    recipe = f"data: {{kind: easy-vqa}}\nmethod: {{name: projector}}\nmodel: {{base: {folders[0]}}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    tuned = module.MaskedModel(pretrained=str(tmp_path))
    assert not any(t.any() for t in find_projector(tuned.model).state_dict().values())
    (tmp_path / "projector.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match="does not fit the base"):
        module.MaskedModel(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": "auto"}, "batch_size is auto; it must be a whole number above 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is int8; it must be float32, bfloat16 or float16"),
        ({"pretrained": "./nowhere"}, "there is no model './nowhere'"),
    ],
)
def test_mistakes(
    module: types.ModuleType, folders: tuple[Path, Path], arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        module.MaskedModel(**{"pretrained": str(folders[0]), **arguments})
