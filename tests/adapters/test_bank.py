"""A bank of hard masks: the merged model's weights, the base's bit for bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maskft.adapters import MaskBank
from maskft.errors import AdapterError, UserError
from tests.tuner.models import logits, tiny_llama

from .helpers import ONE, edit, loaded, saved


def bits_of(folder: Path, seed: int, **fields: object) -> Path:
    return saved(folder, seed=seed, bits=True, gate="topk", keep_ratio=0.7, **fields)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: bits_of(tmp_path / name, seed) for seed, name in enumerate("ab", start=1)}


def test_each_mask_gives_the_merged_model_and_none_the_base(folders: dict[str, Path]) -> None:
    model = tiny_llama()
    before = weights(model)
    bank = MaskBank(model)
    for name, folder in folders.items():
        bank.add(name, folder)
    assert bank.names == ["a", "b"]
    for name in ("a", "b", "a", None, "b"):
        bank.use(name)
        assert bank.active == name
        merged = loaded(folders[name]).merge_and_unload() if name else tiny_llama()
        for key, value in merged.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(logits(model), logits(merged))
    bank.use(None)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_masks_take_a_bit_for_each_weight(folders: dict[str, Path]) -> None:
    bank = MaskBank(tiny_llama())
    bank.add("a", folders["a"])
    masked = sum(
        module.weight.numel() for module in tiny_llama().model.layers.modules() if isinstance(module, nn.Linear)
    )
    assert bank.bytes == masked / 8


def test_masks_of_different_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    """Layers that the next mask leaves alone get their weights back."""
    model = tiny_llama()
    bank = MaskBank(model)
    bank.add("all", folders["a"])
    bank.add("attention", bits_of(tmp_path / "attention", 3, modules="attn"))
    bank.use("all")
    bank.use("attention")
    assert torch.equal(logits(model), logits(loaded(tmp_path / "attention")))


def test_names(folders: dict[str, Path]) -> None:
    bank = MaskBank(tiny_llama())
    with pytest.raises(UserError, match="no mask 'a' in the bank; it has none"):
        bank.use("a")
    bank.add("a", folders["a"])
    with pytest.raises(UserError, match="a mask 'a' in the bank already"):
        bank.add("a", folders["b"])
    bank.use("a")
    with pytest.raises(UserError, match=r"'a' is on the model; call use\(None\)"):
        bank.add("b", folders["b"])


class TestRefused:
    @staticmethod
    def message(folder: Path, model: nn.Module | None = None) -> str:
        model = model or tiny_llama()
        before = weights(model)
        bank = MaskBank(model)
        with pytest.raises(AdapterError) as caught:
            bank.add("a", folder)
        assert bank.names == []
        assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
        return str(caught.value)

    def test_soft_masks(self, tmp_path: Path) -> None:
        assert "mask_scores is not packed. Pack it: maskft pack" in self.message(saved(tmp_path / "soft", gate="soft"))

    def test_packed_soft_masks(self, tmp_path: Path) -> None:
        from maskft.adapters import pack

        pack(saved(tmp_path / "soft", gate="soft"), tmp_path / "packed", "int8")
        assert "is a soft mask" in self.message(tmp_path / "packed")

    def test_another_base(self, folders: dict[str, Path]) -> None:
        assert "was trained on another base" in self.message(folders["a"], tiny_llama(seed=5))

    def test_another_shape(self, folders: dict[str, Path]) -> None:
        text = self.message(folders["a"], tiny_llama(intermediate_size=64))
        assert "mlp.up_proj.mask_scores is of shape" in text

    def test_layers_that_are_not_there(self, folders: dict[str, Path]) -> None:
        text = self.message(folders["a"], tiny_llama(num_hidden_layers=1))
        assert "model.layers.1.self_attn.q_proj.mask_scores belongs to no linear layer" in text
        assert "layers.0" not in text

    def test_other_tensors(self, folders: dict[str, Path]) -> None:
        edit(folders["a"], lambda content: content.update({"base_model.model.lm_head.weight": torch.ones(2)}))
        assert "lm_head.weight is no mask" in self.message(folders["a"])

    def test_nothing_at_all(self, folders: dict[str, Path]) -> None:
        edit(folders["a"], lambda content: content.clear())
        assert "it has no masks" in self.message(folders["a"])

    def test_a_damaged_mask_is_named(self, folders: dict[str, Path]) -> None:
        def cut(content: dict[str, Tensor]) -> None:
            name = next(key for key in content if key.startswith(ONE) and not key.endswith("shape"))
            content[name] = content[name][:-1].clone()

        edit(folders["a"], cut)
        assert f"{ONE}.mask_scores has" in self.message(folders["a"])
