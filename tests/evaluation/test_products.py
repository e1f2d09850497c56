"""HiRA's products are computed once for a block, and its layers compute as before in it and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import HiraConfig, get_peft_model
from torch import nn

from maskft.evaluation.products import cached_products


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).relu())
        return out


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = get_peft_model(Two().bfloat16(), HiraConfig(r=2, target_modules=["first", "second"], hira_dropout=0.5))
    for name, parameter in made.named_parameters():
        if "hira_B" in name:
            nn.init.normal_(parameter.data)
    return made.eval()


def layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "hira_A")]


def test_the_same_numbers_without_multiplying_again(model: Any) -> None:
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = model(x)
        with model.disable_adapter():
            assert not torch.equal(model(x), before)
        with cached_products(model):
            assert torch.equal(model(x), before)
            for layer in layers(model):
                layer.hira_B["default"].data.zero_()  # not looked at any more
            assert torch.equal(model(x), before)
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("state", ["training", "disabled", "merged"])
def test_layers_that_compute_otherwise_are_left(model: Any, state: str) -> None:
    if state == "training":
        model.train()
    elif state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    with cached_products(model):
        assert not any("forward" in vars(layer) for layer in layers(model))


def test_nothing_stays(model: Any) -> None:
    with cached_products(model):
        assert all("forward" in vars(layer) for layer in layers(model))
    assert not any("forward" in vars(layer) for layer in layers(model))
