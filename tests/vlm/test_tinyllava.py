"""Checkpoints of TinyLLaVA Factory give the same tokens, features and logits once imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import maskft.vlm.tinyllava
from maskft.errors import MissingExtraError, ModelError, RunError
from maskft.recipe import load_recipe
from maskft.training import train
from maskft.vlm.tinyllava import import_tinyllava
from tests.data.helpers import llava, png, write_json
from tests.test_cli import call

from .parts import PATCHES, edit_json, picture
from .tinyllava_parts import EOS, FAMILIES, IMAGE, Source, checkpoint, image_features, logits, prompt_ids

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Imported:
    """A checkpoint's modules beside what was imported from it."""

    def __init__(self, source: Source, folder: Path, made: dict[str, Any]) -> None:
        self.source, self.folder, self.made = source, folder, made
        self.model = AutoModelForImageTextToText.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, *turns: tuple[str, str | None], images: list[Image.Image]) -> Any:
        left = iter(images)
        messages: list[dict[str, Any]] = []
        for question, answer in turns:
            pieces = question.split("<image>")
            parts: list[dict[str, Any]] = [{"type": "image", "image": next(left)} for _ in pieces[1:]]
            parts.append({"type": "text", "text": "".join(pieces).removeprefix("\n")})
            messages.append({"role": "user", "content": parts})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=turns[-1][1] is None,
        )

    def ids(self, inputs: Any) -> list[int]:
        """Token ids with each image's run of tokens as one -200."""
        token, count = self.processor.image_token_id, self.made["image_tokens"]
        ids, left = inputs["input_ids"][0].tolist(), []
        while ids:
            if ids[0] == token:
                assert ids[:count] == [token] * count
                left, ids = [*left, IMAGE], ids[count:]
            else:
                left.append(ids.pop(0))
        return left


@pytest.fixture(scope="module", params=FAMILIES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp(request.param)
    source = checkpoint(request.param, folder / "from", whole=request.param != "qwen2")
    return Imported(source, folder / "to", import_tinyllava(folder / "from", folder / "to"))


CONVERSATIONS = {
    "a question": ([("<image>\nWhat colour is the shape?", None)], 1),
    "answered": ([("<image>\nWhat is the shape?", "A circle.")], 1),
    "text alone": ([("What is red?", None)], 0),
    "two turns": ([("<image>\nWhat colour?", "red"), ("Is the shape a circle?", "yes")], 1),
    "two images": ([("<image>\nWhat colour?", "red"), ("<image>\nWhat shape?", None)], 2),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_tokens_and_logits(imported: Imported, case: str) -> None:
    turns, count = CONVERSATIONS[case]
    images = [picture(i, size) for i, size in zip(range(count), ((40, 30), (20, 50)), strict=False)]
    inputs = imported.inputs(*turns, images=images)
    expected = prompt_ids(imported.source, *turns)
    assert imported.ids(inputs) == expected
    with torch.inference_mode():
        found = imported.model(**inputs).logits[0]
    wanted = logits(imported.source, expected, images)
    assert wanted.std() > 0.3
    torch.testing.assert_close(found[:, : wanted.shape[-1]], wanted, **CLOSE)


def test_features_after_the_connector(imported: Imported) -> None:
    images = [picture(0), picture(1, (20, 50))]
    turns = [("<image>\nWhat?", "red"), ("<image>\nWhat?", None)]
    inputs = imported.inputs(*turns, images=images)
    with torch.inference_mode():
        found = imported.model(**inputs).image_hidden_states
    wanted = image_features(imported.source, images)
    assert wanted.shape[1] == PATCHES - 1 == imported.made["image_tokens"]  # SigLIP's first patch is left out, too
    scale = imported.model.config.text_config.hidden_size**0.5 if imported.source.family == "gemma" else 1
    torch.testing.assert_close(found / scale, wanted.flatten(0, 1), **CLOSE)


def test_what_is_written(imported: Imported) -> None:
    config, tokenizer = imported.model.config, imported.processor.tokenizer
    assert type(imported.model) is LlavaForConditionalGeneration
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert tokenizer.pad_token == ("<|endoftext|>" if imported.source.family in ("phi", "qwen2") else "<unk>")
    assert tokenizer.eos_token == EOS[imported.source.family]
    assert imported.model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.tie_word_embeddings == (imported.source.family in ("qwen2", "gemma"))
    assert not imported.made["embeddings_grown"]  # the spare rows are taken
    assert imported.made["dtype"] == "float32"
    assert not list(imported.folder.glob("*.py"))
    assert "auto_map" not in (imported.folder / "config.json").read_text()


def test_labels_begin_with_the_answer(imported: Imported) -> None:
    from maskft.data import Collator

    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    batch = Collator(imported.processor)([{"messages": messages, "images": []}])
    trained = batch["labels"][0][batch["labels"][0] != -100]
    assert imported.processor.tokenizer.decode(trained).strip() == f"red{EOS[imported.source.family]}"


def test_it_trains(imported: Imported, tmp_path: Path) -> None:
    rows = [llava("<image>\nWhat colour?", "red", image="0.png")] * 4
    png(tmp_path / "0.png")
    content = {
        "model": {"base": str(imported.folder), "dtype": "float32"},
        "data": {"kind": "files", "train": str(write_json(tmp_path / "train.json", rows))},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05},
    }
    metrics = train(load_recipe(write_json(tmp_path / "recipe.yaml", content)), tmp_path / "run")
    assert metrics["train"]["steps"] == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


class TestLayouts:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        checkpoint("phi", tmp_path / "from")
        return tmp_path / "from"

    def imported(self, folder: Path, **options: Any) -> Any:
        out = folder.parent / "out"
        import_tinyllava(folder, out, **options)
        return AutoModelForImageTextToText.from_pretrained(out)

    def refused(self, folder: Path, match: str, error: type[Exception] = ModelError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            import_tinyllava(folder, folder.parent / "out", **options)
        assert not (folder.parent / "out").exists()

    def test_shards_and_dtype(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        keys = sorted(tensors)
        for number, part in enumerate((keys[::2], keys[1::2]), 1):
            save_file({key: tensors[key] for key in part}, folder / f"model-0000{number}-of-00002.safetensors")
        (folder / "model.safetensors").unlink()
        assert self.imported(folder, dtype="bfloat16").dtype == torch.bfloat16

    def test_half_precision_is_kept(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / "model.safetensors")
        assert self.imported(folder).dtype == torch.float16

    @pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu"])
    def test_one_linear_layer(self, folder: Path, kind: str) -> None:
        edit_json(folder / "config.json", connector_type=kind)
        tensors = load_file(folder / "model.safetensors")
        prefix = "connector._connector."
        before = {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        layer = "" if kind == "linear" else "0."
        for name in ("weight", "bias"):
            tensors[f"{prefix}{layer}{name}"] = before[f"{prefix}0.{name}"]
        save_file(tensors, folder / "model.safetensors")
        projector = self.imported(folder).model.multi_modal_projector
        x = torch.randn(3, 16)
        with torch.inference_mode():
            expected = torch.nn.functional.linear(x, before[f"{prefix}0.weight"], before[f"{prefix}0.bias"])
            torch.testing.assert_close(projector(x), expected)

    def test_all_tokens_of_the_tower(self, folder: Path) -> None:
        edit_json(folder / "config.json", vision_feature_select_strategy="cls_patch")
        assert self.imported(folder).config.vision_feature_select_strategy == "full"

    def test_padded_images(self, folder: Path) -> None:
        edit_json(folder / "config.json", image_aspect_ratio="pad")
        self.imported(folder)
        images = AutoProcessor.from_pretrained(folder.parent / "out").image_processor
        wide = picture(0, (40, 20))
        square = Image.new("RGB", (40, 40), (127, 127, 127))
        square.paste(wide, (0, 10))
        assert torch.equal(
            images(wide, return_tensors="pt")["pixel_values"], images(square, return_tensors="pt")["pixel_values"]
        )

    def test_a_tower_with_its_own_image_processor(self, folder: Path) -> None:
        from .tinyllava_parts import pixels

        settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}, "resample": 0}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        self.imported(folder)
        images = AutoProcessor.from_pretrained(folder.parent / "out").image_processor
        assert not torch.equal(images(picture(), return_tensors="pt")["pixel_values"], pixels([picture()]))

    def test_embeddings_saved_as_the_head(self, tmp_path: Path) -> None:
        source = checkpoint("qwen2", tmp_path / "from")
        tensors = load_file(tmp_path / "from" / "model.safetensors")
        tensors["language_model.lm_head.weight"] = tensors.pop("language_model.model.embed_tokens.weight")
        save_file(tensors, tmp_path / "from" / "model.safetensors")
        embeddings = self.imported(tmp_path / "from").get_input_embeddings().weight
        assert torch.equal(embeddings, source.language.get_input_embeddings().weight)

    def test_no_spare_row(self, tmp_path: Path) -> None:
        source = checkpoint("llama", tmp_path / "from", spare_rows=0)
        made = import_tinyllava(tmp_path / "from", tmp_path / "out")
        assert made["embeddings_grown"]
        assert made["image_token_id"] == source.language.config.vocab_size

    @pytest.mark.parametrize("connector", ["resampler", "qformer", "mof_mlp", "mlp3x_gelu", "identity", None])
    def test_connectors(self, folder: Path, connector: str | None) -> None:
        edit_json(folder / "config.json", connector_type=connector)
        self.refused(folder, f"connector is '{connector}', which the LLaVA form cannot hold")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"model_type": "llava"}, "is not a checkpoint of TinyLLaVA Factory: model_type .* is 'llava'"),
            ({"text_config": {"model_type": "openelm"}}, r"text_config\.model_type in .* is 'openelm'"),
            ({"text_config": None}, r"text_config\.model_type in .* is None"),
            ({"vision_config": {"model_type": "mof"}}, r"vision_config\.model_type in .* is 'mof'"),
            ({"vision_model_name_or_path2": "facebook/dinov2-large"}, r"mixes two vision towers \(mof\)"),
            ({"vision_feature_select_strategy": "cls"}, "must be patch or cls_patch"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio in .* is 'anyres'"),
            (
                {"vision_config": {"model_type": "dinov2"}},
                "has no preprocessor_config.json, and towers of the type dinov2",
            ),
        ],
    )
    def test_configs(self, folder: Path, changes: dict[str, Any], match: str) -> None:
        edit_json(folder / "config.json", **changes)
        self.refused(folder, match)

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        self.refused(folder, "is not valid JSON")
        (folder / "config.json").write_text("[]")
        self.refused(folder, "is not a checkpoint of TinyLLaVA Factory")
        (folder / "config.json").unlink()
        self.refused(folder, "cannot read .*config.json: No such file")

    def test_options(self, folder: Path) -> None:
        self.refused(folder, "--dtype is 'half'", dtype="half")
        (folder / "adapter_config.json").touch()
        self.refused(folder, "holds an adapter")
        with pytest.raises(RunError, match="not empty"):
            import_tinyllava(folder, folder)

    def test_no_tokenizer(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "tokenizer_config.json").rename(folder / "kept")
        self.refused(folder, "holds no tokenizer. Copy the tokenizer's files of org/phi")
        (folder / "kept").rename(folder / "tokenizer_config.json")
        (folder / "vocab.json").write_text("{")
        self.refused(folder, "cannot load the tokenizer in")
        (folder / "tokenizer.model").touch()
        monkeypatch.setattr(maskft.vlm.tinyllava, "find_spec", lambda name: None)
        self.refused(folder, r"pip install 'maskft\[import\]'", MissingExtraError)

    def test_pickles(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(folder, r"pytorch_model.bin is a pickle, .* weights_only=True")
        (folder / "pytorch_model.bin").unlink()
        self.refused(folder, "holds no .safetensors file")
        (folder / "model.safetensors").write_bytes(b"nothing")
        self.refused(folder, "cannot be read: .* Download it again")

    def test_tensors(self, folder: Path) -> None:
        kept = folder.parent / "kept.safetensors"
        shutil.copy(folder / "model.safetensors", kept)

        def changed(**tensors: torch.Tensor | None) -> None:
            content = {**load_file(kept), **{key.replace("__", "."): tensor for key, tensor in tensors.items()}}
            save_file(
                {key: tensor for key, tensor in content.items() if tensor is not None}, folder / "model.safetensors"
            )

        changed(other=torch.zeros(1))
        self.refused(folder, "not in TinyLLaVA Factory's layout.*\n?.*other is none of them")
        changed(language_model__model__final_layernorm__bias=None)
        self.refused(folder, "does not fit its configuration:\n.*final_layernorm.bias is missing")
        changed(language_model__other=torch.zeros(1))
        self.refused(folder, "does not fit its configuration:\n.*other is unknown")
        changed(language_model__model__final_layernorm__bias=torch.zeros(3))
        self.refused(folder, "does not fit its configuration")
        changed(connector___connector__2__bias=None)
        self.refused(folder, "the connector mlp2x_gelu needs the tensors")
        save_file({"language_model.model.norm.weight": torch.zeros(1)}, folder / "model.safetensors")
        self.refused(folder, "vision_tower has no tensor")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint("phi", tmp_path / "from")
    given = ("import", tmp_path / "from", "--output", tmp_path / "out")
    assert call(monkeypatch, *given, "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["source"] == str(tmp_path / "from")
    assert "its bias is now in the head's weight" in err
    assert call(monkeypatch, "import", tmp_path / "none", "--output", tmp_path / "other") == 2
    assert "Give a checkpoint's folder" in capfd.readouterr().err
