"""Vision towers and language models composed into models that plain Transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    Dinov2Model,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
    ViTModel,
)

from maskft.errors import ModelError
from maskft.preview import preview
from maskft.recipe import load_recipe
from maskft.training import train
from maskft.vlm.compose import compose
from tests.data.helpers import llava, png, write_json
from tests.test_cli import call

from .parts import PATCHES, language, picture, tower

TOWERS = {
    "siglip": (SiglipVisionModel, 0),
    "siglip-vision": (SiglipVisionModel, 0),
    "clip": (CLIPVisionModel, 1),
    "dinov2": (Dinov2Model, 1),
    "dinov2-registers": (None, 5),
    "vit": (ViTModel, 1),
}
RECIPE = Path(__file__).parents[2] / "recipes" / "stage1-llava.yaml"
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and language models by name."""
    made = tmp_path_factory.mktemp("parts")
    for kind in TOWERS:
        tower(kind, made / kind)
    language("llama", made / "llama")
    return made


def question(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def encode(processor: Any, messages: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@pytest.mark.parametrize("features", ["patch", "full"])
@pytest.mark.parametrize("kind", TOWERS)
def test_towers(folder: Path, tmp_path: Path, kind: str, features: Any) -> None:
    made = compose(str(folder / kind), str(folder / "llama"), tmp_path / "out", features=features)
    expected, extra = TOWERS[kind]
    assert made["image_tokens"] == PATCHES + extra - (features == "patch" and extra > 0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(model) is LlavaForConditionalGeneration
    inputs = encode(processor, question({"type": "image", "image": picture()}, {"type": "text", "text": "What?"}))
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == made["image_tokens"]
    with torch.inference_mode():
        features_given = model(**inputs).image_hidden_states
    if expected is None:
        return
    plain = expected.from_pretrained(folder / kind)
    with torch.inference_mode():
        hidden = plain(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        if features == "patch":
            hidden = hidden[:, extra:]
        torch.testing.assert_close(features_given, model.model.multi_modal_projector(hidden)[0], atol=1e-6, rtol=1e-5)


def test_the_language_model_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    made = compose(str(folder / "siglip"), str(folder / "llama"), tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder / "llama")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits = after(input_ids=ids).logits
        assert torch.equal(logits[..., : before.config.vocab_size], before(input_ids=ids).logits)
    assert made["embeddings_grown"]
    assert made["image_token_is"] == "added"
    assert logits.shape[-1] == before.config.vocab_size + 1
    torch.testing.assert_close(logits[..., -1], logits[..., :-1].mean(-1))
    assert sum(made["parameters"].values()) == after.num_parameters()


@pytest.mark.parametrize(
    ("special", "rows", "token", "origin", "grown"),
    [
        (["<unused0>", "<unused1>"], 0, "<unused0>", "a spare token", False),
        (["<|image_pad|>", "<unused0>"], 0, "<|image_pad|>", "its own", False),
        (["<|reserved_special_token_0|>"], 0, "<|reserved_special_token_0|>", "a spare token", False),
        ([], 3, "<image>", "added", False),
        ([], 0, "<image>", "added", True),
    ],
)
def test_image_token(
    folder: Path, tmp_path: Path, special: list[str], rows: int, token: str, origin: str, grown: bool
) -> None:
    language("llama", tmp_path / "lm", *special, rows=rows, tie_word_embeddings=True)
    made = compose(str(folder / "siglip"), str(tmp_path / "lm"), tmp_path / "out")
    assert (made["image_token"], made["image_token_is"], made["embeddings_grown"]) == (token, origin, grown)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert processor.image_token == token
    assert processor.image_token_id == model.config.image_token_id == made["image_token_id"]
    assert processor.tokenizer(f"a{token}b")["input_ids"].count(processor.image_token_id) == 1
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight  # tied, as in the language model
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_language_models_own_chat_template(folder: Path, tmp_path: Path) -> None:
    language("llama", tmp_path / "lm", template=CHAT)
    compose(str(folder / "siglip"), str(tmp_path / "lm"), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    messages = question({"type": "image"}, {"type": "text", "text": "What's it?"})
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
    assert processor.apply_chat_template(messages) == "[user]<image>\nWhat's it?<|end|>[assistant]red<|end|>"
    plain = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert plain == "[user]Hi<|end|>[a]"


def test_a_chat_template_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    compose(str(folder / "siglip"), str(folder / "llama"), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "system", "content": "Be brief."},
        *question({"type": "text", "text": "What?"}, {"type": "image"}, {"type": "image"}),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    expected = "Be brief. USER: <image>\n<image>\nWhat? ASSISTANT: red<|end|>"
    assert processor.apply_chat_template(messages) == expected


def test_it_ends_where_the_tokenizer_does(folder: Path, tmp_path: Path) -> None:
    language("llama", tmp_path / "lm", eos_token_id=None)
    compose(str(folder / "siglip"), str(tmp_path / "lm"), tmp_path / "out")
    settings = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").generation_config
    assert settings.eos_token_id == settings.pad_token_id == 0


def test_projectors(folder: Path, tmp_path: Path) -> None:
    parts = (str(folder / "clip"), str(folder / "llama"))
    compose(*parts, tmp_path / "a", projector="linear", vision_layer=1)
    linear = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").model.multi_modal_projector
    x = torch.randn(5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), linear.linear_1(x))
    compose(*parts, tmp_path / "b", seed=1, dtype="bfloat16")
    compose(*parts, tmp_path / "c", seed=1)
    b, c = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in "bc")
    assert (b.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(
        b.model.multi_modal_projector.linear_1.weight, c.model.multi_modal_projector.linear_1.weight.bfloat16()
    )


def test_phi_is_composed(folder: Path, tmp_path: Path) -> None:
    language("phi", tmp_path / "lm")
    made = compose(str(folder / "siglip"), str(tmp_path / "lm"), tmp_path / "out")
    assert made["head_bias_absorbed"] < 1e-5
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = before(input_ids=ids).logits
        torch.testing.assert_close(after(input_ids=ids).logits[..., :-1], expected, atol=1e-5, rtol=0)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("compose", "--vision", folder / "siglip", "--language", folder / "llama", "--output", tmp_path / "out")
    assert call(monkeypatch, *given, "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["image_token"] == "<image>"
    assert "embeddings grew by a row" in err
    assert "stage1-llava.yaml" in err
    assert call(monkeypatch, *given) == 2
    assert "not empty" in capfd.readouterr().err


def test_stage_1_of_a_composed_model(folder: Path, tmp_path: Path) -> None:
    """The shipped recipe on a tiny base: a dry run, two steps, and the projector in a new base."""
    compose(str(folder / "siglip"), str(folder / "llama"), tmp_path / "base")
    rows = []
    for number, colour in enumerate(("red", "blue", "lime")):
        png(tmp_path / "images" / f"{number}.png", colour)
        rows.append(llava("Say what it is.\n<image>", colour, image=f"{number}.png"))
    data = write_json(tmp_path / "blip_laion_cc_sbu_558k.json", rows)
    recipe = load_recipe(
        RECIPE,
        [
            f"model.base={tmp_path / 'base'}",
            f"data.train={data}",
            f"data.image_root={tmp_path / 'images'}",
            "model.dtype=float32",
        ],
    )
    seen = preview(recipe, tmp_path / "run")
    arguments = seen["training_arguments"]
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 256
    assert (arguments["learning_rate"], arguments["max_length"]) == (1e-3, 2048)
    assert seen["trainable_parameters"] == 16 * 24 + 24 + 24 * 24 + 24
    short = {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
    }
    train(recipe.model_copy(update={"training": {**recipe.training, **short}}), tmp_path / "run")
    trained = tmp_path / "run" / "projector.safetensors"
    compose(str(folder / "siglip"), str(folder / "llama"), tmp_path / "aligned", weights=trained)
    before, after = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("base", "aligned"))
    assert not torch.equal(
        before.model.multi_modal_projector.linear_1.weight, after.model.multi_modal_projector.linear_1.weight
    )
    language("llama", tmp_path / "wide", hidden_size=32)
    with pytest.raises(ModelError, match="do not fit these models"):
        compose(str(folder / "siglip"), str(tmp_path / "wide"), tmp_path / "other", weights=trained)
