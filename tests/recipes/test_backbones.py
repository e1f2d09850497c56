"""The studies' small backbones: their first weights, their rows, and their recipes before the first step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from maskft.data.easy_vqa import COLORS, INSTRUCTION
from maskft.errors import RunError
from maskft.fingerprint import fingerprint
from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.vlm.load import load_model, load_skeleton
from tests.data.helpers import llava, png
from tests.recipes.shrunken import ROOT, shrunken_base

BACKBONES = ROOT / "recipes" / "backbones"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("make_backbones", BACKBONES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _script()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where data and models are as the recipes name them, the models from a shrunken base."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    base = shrunken_base("tinyllava-tinyllama-1.1b", folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(make.PHI, "num_attention_heads", 4)
        make.main(["rows", "data/shapes", "data/pictures", "--output", "data/backbones.json"])
        make.main(["captions", "data/shapes", "data/told", "--output", "data/captions.json"])
        make.main(["shallow", str(base), "models/shallow-unhealed", "--layers", "1"])
        make.main(["phi", str(base), "models/phi-untrained"])
        (folder / "models" / "small-pictures").symlink_to(base)
    return folder


def write_data(folder: Path) -> None:
    """What `maskft data` writes, in little: two drawn shapes, and a picture with six questions."""
    captions = {"7": "A red circle.", "8": "A teal triangle."}
    written = {
        "shapes": [
            llava("<image>\nDescribe the image briefly.", caption, id=f"easy-vqa/train/{image}", image=f"{image}.png")
            for image, caption in captions.items()
        ],
        "pictures": [
            llava(f"<image>\nIs this {n}?", "no", id=f"stamps/cat/there/{n}", image="cat.png") for n in range(6)
        ],
    }
    written["told"] = [
        llava("<image>\nWhich digit is this?", "7", id="digits/4/which", image="4.png"),
        llava("<image>\nWhat is this digit plus 2?", "9", id="digits/4/plus", image="4.png"),
        llava("<image>\nWhat kind of thing is this?", "big cats", id="clipart/cat/label/0", image="cat.png"),
    ]
    for name, rows in written.items():
        for row in rows:
            png(folder / name / str(row["image"]), "red")
        (folder / name / "train.json").write_text(json.dumps(rows))


def turns(rows: list[dict[str, Any]], image: str) -> list[list[tuple[str, str]]]:
    """Questions and answers of each conversation about an image."""
    values = [[turn["value"] for turn in row["conversations"]] for row in rows if row["image"] == image]
    return [list(zip(said[::2], said[1::2], strict=True)) for said in values]


def test_a_conversation_has_an_image_once_and_few_turns(place: Path) -> None:
    rows = json.loads((place / "data" / "backbones.json").read_text())
    assert len(rows) == 3
    assert [len(pairs) for pairs in turns(rows, "pictures/cat.png")] == [make.TURNS]
    for row in rows:
        says = [turn["value"] for turn in row["conversations"]]
        assert says[0].startswith("<image>\n")
        assert sum("<image>" in text for text in says) == 1
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(says) // 2)


def test_questions_about_a_shape_have_the_captions_answers() -> None:
    told = {
        (question.split("\n")[0], answer) for seed in range(9) for question, answer in about("A blue circle.", seed)
    }
    assert {("Name its color.", "blue"), ("Name its form.", "circle")} < told
    assert {("Do you see something blue?", "yes"), ("Do you see a circle?", "yes")} < told
    others = [color for color in COLORS if (f"Do you see something {color}?", "no") in told]
    assert others
    assert "blue" not in others


def about(caption: str, seed: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = make._about_shape(caption, make.random.Random(seed))
    return [(question.removesuffix(INSTRUCTION), answer) for question, answer in found]


def test_captions_say_what_is_seen(place: Path) -> None:
    rows = json.loads((place / "data" / "captions.json").read_text())
    shapes = [row for row in rows if row["image"].startswith("shapes/")]
    told = [row for row in rows if row not in shapes]
    assert {(row["image"], row["conversations"][1]["value"]) for row in told} == {
        ("told/4.png", "The digit 7."),
        ("told/cat.png", "A drawing of big cats."),
    }
    assert {row["conversations"][0]["value"] for row in told} == {"<image>\nDescribe the image briefly."}
    assert [len(row["conversations"]) for row in shapes] == [2, 2]
    assert all(row["conversations"][0]["value"].endswith(INSTRUCTION) for row in shapes)


def test_a_folder_given_twice_is_seen_twice(place: Path) -> None:
    folder = place / "data" / "told"
    assert len(make.captions([folder, folder])) == 2 * len(make.captions([folder]))


def test_shallow_has_the_chosen_layers(place: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(place / "base").model.language_model
    made = AutoModelForImageTextToText.from_pretrained(place / "models" / "shallow-unhealed").model.language_model
    assert len(made.layers) == 1
    kept, chosen = made.layers[0].state_dict(), base.layers[1].state_dict()
    assert kept.keys() == chosen.keys()
    assert all(torch.equal(kept[name], chosen[name]) for name in chosen)
    assert torch.equal(made.embed_tokens.weight, base.embed_tokens.weight)


def test_phi_is_of_its_family_with_the_bases_tower_and_processor(place: Path) -> None:
    folder = place / "models" / "phi-untrained"
    base = AutoModelForImageTextToText.from_pretrained(place / "base")
    made = AutoModelForImageTextToText.from_pretrained(folder)
    assert made.config.text_config.model_type == "phi"
    assert made.dtype == torch.bfloat16
    for part in ("vision_tower", "multi_modal_projector"):
        before, own = getattr(base.model, part).state_dict(), getattr(made.model, part).state_dict()
        assert all(torch.equal(own[name], before[name]) for name in before)
    assert made.lm_head.weight is made.get_input_embeddings().weight
    assert torch.equal(made.lm_head.weight, base.get_input_embeddings().weight)
    processors = [AutoProcessor.from_pretrained(path) for path in (place / "base", folder)]
    assert processors[0].chat_template == processors[1].chat_template


def test_a_folder_in_use_is_refused(place: Path) -> None:
    with pytest.raises(RunError, match="phi-untrained"):
        make.phi(place / "base", place / "models" / "phi-untrained")


@pytest.mark.parametrize("name", ["shallow", "phi", "pictures"])
def test_dry_run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    seen = preview(load_recipe(BACKBONES / f"{name}.yaml"), Path("runs") / name)
    assert seen["missing"] == []
    assert seen["train_examples"] == {"shallow": 3, "phi": 3, "pictures": 4}[name]
    model = load_skeleton(str(place / "models" / seen["recipe"]["model"]["base"]), dtype="bfloat16")
    projector, vision = (size_of(model, part) for part in ("multi_modal_projector", "vision_tower"))
    assert seen["trainable_parameters"] == (projector if name == "pictures" else seen["base_parameters"] - vision)


def size_of(model: torch.nn.Module, part: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def test_small_pictures_have_few_tokens(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "embedded_base", lambda: place / "base")
    make.main(["small-pictures", str(place / "small")])
    with pytest.raises(RunError, match="exists"):
        make.main(["small-pictures", str(place / "small")])
    processor, model = (
        AutoProcessor.from_pretrained(place / "small"),
        load_skeleton(str(place / "small"), dtype="float32"),
    )
    encoded = processor(text="<image>", images=Image.new("RGB", (80, 60)), return_tensors="pt")
    assert encoded["pixel_values"].shape[-2:] == (56, 56)
    assert (encoded["input_ids"] == processor.image_token_id).sum() == model.config.image_seq_length


@pytest.mark.parametrize(
    ("name", "of_results"),
    [
        ("small-pictures", "e3ee1ff2d162b36e2441c2cd4596cc5e9d1ee12a2ec0f9aac410e7a3f77cba93"),
        ("pictures", "9a81396ec38f37fdf2671bda97fd567a40da941c5503fcfcbbf6e95b26292153"),
    ],
)
def test_the_shipped_projectors_make_the_bases_of_the_studies(name: str, of_results: str, tmp_path: Path) -> None:
    shipped = BACKBONES / name / "projector.safetensors"
    make.main(["small-pictures", str(tmp_path / "small"), "--projector", str(shipped)])
    model = load_model(str(tmp_path / "small"), dtype="bfloat16")
    assert fingerprint(dict(model.named_parameters())) == of_results
