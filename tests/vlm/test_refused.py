"""What cannot be composed is named, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BartConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    ResNetConfig,
    ResNetModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SwinConfig,
    SwinModel,
    ViTConfig,
)

from maskft.errors import ModelError, RunError
from maskft.vlm.compose import compose

from .parts import SIZE, VISION, edit_json, language, spread, tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and a language model by name."""
    made = tmp_path_factory.mktemp("parts")
    for kind in ("clip", "vit"):
        tower(kind, made / kind)
    language("llama", made / "llama")
    return made


class TestRefused:
    def refused(self, vision: Path | str, language: Path | str, out: Path, match: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=match):
            compose(str(vision), str(language), out, **options)
        assert not out.exists()

    def test_options(self, folder: Path, tmp_path: Path) -> None:
        parts = (folder / "clip", folder / "llama", tmp_path / "out")
        self.refused(*parts, r"--projector is 'mlp', but must be linear or mlp2x_gelu", projector="mlp")
        self.refused(*parts, "--features is 'cls'", features="cls")
        self.refused(*parts, "--dtype is 'bf16'", dtype="bf16")
        self.refused(*parts, "--vision-layer is 9, but .* hidden states 0 to 3", vision_layer=9)
        self.refused(*parts, "cannot read the projector", weights=tmp_path / "none.safetensors")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(RunError, match="not empty"):
            compose(str(parts[0]), str(parts[1]), tmp_path / "full")

    def test_no_model(self, folder: Path, tmp_path: Path) -> None:
        self.refused(tmp_path, folder / "llama", tmp_path / "out", r"--vision is .*config\.json is missing")
        self.refused(folder / "clip", "./none", tmp_path / "out", r"--language is './none'")
        edit_json(self.copied(folder / "clip", tmp_path / "other") / "config.json", model_type="none")
        self.refused(tmp_path / "other", folder / "llama", tmp_path / "out", "cannot load a vision tower")
        edit_json(self.copied(folder / "llama", tmp_path / "lm") / "config.json", model_type="none")
        self.refused(folder / "clip", tmp_path / "lm", tmp_path / "out", "cannot load a language model")

    @staticmethod
    def copied(source: Path, to: Path) -> Path:
        to.mkdir()
        for file in source.iterdir():
            (to / file.name).write_bytes(file.read_bytes())
        return to

    def test_towers_without_patches(self, folder: Path, tmp_path: Path) -> None:
        lm, out = folder / "llama", tmp_path / "out"
        images = json.loads((folder / "clip" / "preprocessor_config.json").read_text())
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
        spread(SwinModel(SwinConfig(image_size=SIZE, patch_size=7, **sizes))).save_pretrained(tmp_path / "swin")
        (tmp_path / "swin" / "preprocessor_config.json").write_text(json.dumps(images))
        self.refused(tmp_path / "swin", lm, out, "not one vector a patch. Towers that fit: SigLIP")
        self.copied(folder / "clip", tmp_path / "resnet")
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
        ResNetModel(config).save_pretrained(tmp_path / "resnet")
        self.refused(tmp_path / "resnet", lm, out, "has no square patches")
        self.refused(lm, lm, out, "image processor")

    def test_towers_that_do_not_fit_their_folder(self, folder: Path, tmp_path: Path) -> None:
        lm, out = folder / "llama", tmp_path / "out"
        ViTConfig(**VISION).save_pretrained(self.copied(folder / "clip", tmp_path / "vit"))
        self.refused(tmp_path / "vit", lm, out, "lacks .* tensors of ViTModel")
        settings = self.copied(folder / "vit", tmp_path / "large") / "preprocessor_config.json"
        edit_json(settings, size={"height": 2 * SIZE, "width": 2 * SIZE})
        self.refused(tmp_path / "large", lm, out, "cannot read an image")

    def test_images_of_changing_size(self, folder: Path, tmp_path: Path) -> None:
        both = {
            "vision_config": {**VISION, "num_patches": 16},
            "text_config": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64},
        }
        spread(Siglip2Model(Siglip2Config(**both))).save_pretrained(tmp_path / "naflex")
        Siglip2ImageProcessorPil(patch_size=7, max_num_patches=16).save_pretrained(tmp_path / "naflex")
        self.refused(tmp_path / "naflex", folder / "llama", tmp_path / "out", "images of changing size or shape")

    def test_language_models(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        BartConfig().save_pretrained(tmp_path / "bart")
        self.refused(folder / "clip", tmp_path / "bart", out, "is an encoder-decoder")
        self.refused(folder / "clip", folder / "clip", out, "sees already")
        self.refused(folder / "clip", folder / "vit", out, "is not a causal language model")
        edit_json(
            self.copied(folder / "llama", tmp_path / "q") / "config.json", quantization_config={"quant_method": "x"}
        )
        self.refused(folder / "clip", tmp_path / "q", out, "is quantised")
        gpt2 = {"vocab_size": 300, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32}
        GPT2LMHeadModel(GPT2Config(**gpt2)).save_pretrained(self.copied(folder / "llama", tmp_path / "gpt2"))
        self.refused(folder / "clip", tmp_path / "gpt2", out, "embeddings that are not called embed_tokens")
        edit_json(self.copied(folder / "llama", tmp_path / "e") / "tokenizer_config.json", eos_token=None)
        self.refused(folder / "clip", tmp_path / "e", out, "has no end-of-text token")

    @pytest.mark.parametrize("kind", ["cohere", "gemma2", "granite"])
    def test_scaled_or_capped_logits(self, folder: Path, tmp_path: Path, kind: str) -> None:
        self.copied(folder / "llama", tmp_path / "lm")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"vocab_size": 300, "num_key_value_heads": 1}
        model = {
            "cohere": lambda: CohereForCausalLM(CohereConfig(**sizes)),
            "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8)),
            "granite": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=2.0)),
        }[kind]()
        spread(model).save_pretrained(tmp_path / "lm")
        self.refused(folder / "clip", tmp_path / "lm", tmp_path / "out", "scales or caps its logits")
