"""What PEFT's HiRA computes anew for every token of an answer, computed once.

HiRA (Hadamard high-rank adaptation) adds `W * (B A)` to each weight `W`. Its layers multiply this out in fp32 in every
forward pass: to train they must, to answer they need not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@contextlib.contextmanager
def cached_products(model: Any) -> Iterator[None]:
    """Keep what HiRA layers add to their weights for the duration of the block, in which nothing may be trained.

    It takes four bytes a weight, as training does, which keeps the products for its backward pass. Layers that are
    merged, disabled, quantised or drop inputs are left as they are.
    """
    changed = [layer for layer in model.modules() if _adds_product(layer)]
    for layer in changed:
        layer.forward = functools.partial(_forward, layer, [_product(layer, name) for name in layer.active_adapters])
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward  # the class's own is seen again


def _adds_product(layer: Any) -> bool:
    if not type(layer).__module__.startswith("peft.tuners.hira.") or not getattr(layer, "hira_A", None):
        return False
    known = all(name in layer.hira_A for name in layer.active_adapters)
    plain = type(layer).__name__ == "Linear" and not layer.fan_in_fan_out and not layer.training
    return plain and known and not layer.disable_adapters and not layer.merged


def _product(layer: Any, name: str) -> Tensor:
    """W * (B A), in the dtype of the factors."""
    factors = layer.hira_A[name].T @ layer.hira_B[name].T
    product: Tensor = (layer.get_base_layer().weight * factors.T).detach()
    return product


def _forward(layer: Any, products: Sequence[Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    dtype = result.dtype
    for product in products:
        result = result + F.linear(x.to(product.dtype), product)
    return result.to(dtype)
