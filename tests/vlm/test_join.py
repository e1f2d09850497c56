"""The bias of an output head moves into the head's weight and the norm before it."""

from __future__ import annotations

import pytest
import torch

from maskft.errors import ModelError
from maskft.vlm.join import absorb_head_bias

from .parts import language_model


@pytest.mark.parametrize("norm", ["random", "no bias", "a dead unit", "cancelling bias"])
def test_a_heads_bias_is_absorbed(norm: str) -> None:
    model = language_model("phi", 300)
    with torch.no_grad():
        last = model.model.final_layernorm
        if norm == "no bias":
            last.bias.zero_()
        elif norm == "a dead unit":
            last.weight[3] = 0
        elif norm == "cancelling bias":
            last.bias.copy_(last.weight * (last.bias - last.bias.mean()))
        ids = torch.arange(50)[None]
        before = model(input_ids=ids).logits
        error = absorb_head_bias(model, "phi")
        after = model(input_ids=ids).logits
    assert model.lm_head.bias is None
    assert error is not None
    assert error < 1e-5
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_a_bias_of_zeros_is_dropped_whatever_the_norm() -> None:
    model = language_model("llama", 300)
    model.lm_head = torch.nn.Linear(24, 300)
    torch.nn.init.zeros_(model.lm_head.bias)
    weight = model.lm_head.weight.detach().clone()
    assert absorb_head_bias(model, "llama") == 0
    assert torch.equal(model.lm_head.weight, weight)
    model.lm_head = torch.nn.Linear(24, 300)
    with pytest.raises(ModelError, match="has a bias that no layer norm stands before"):
        absorb_head_bias(model, "llama")
