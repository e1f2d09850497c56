"""A base's fingerprint: same for the same values, another for any change."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from maskft.fingerprint import fingerprint


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator).bfloat16(),
        "b": torch.randn(5, 2, generator=generator).bfloat16(),
    }


def test_pinned_value() -> None:
    # a change of the hash would orphan every saved adapter
    given = {"layer": torch.tensor([[1.0, -2.0], [0.5, 0.0]])}
    bf16 = bytes.fromhex("803f00c0003f0000")  # little-endian upper halves of the fp32 numbers
    assert fingerprint(given) == hashlib.sha256(b"layer (2, 2)\n" + bf16).hexdigest()
    assert fingerprint(given).startswith("efc7637f090aabf7")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_does_not_depend_on_the_loaded_dtype(dtype: torch.dtype) -> None:
    assert fingerprint({name: weight.to(dtype) for name, weight in weights().items()}) == fingerprint(weights())


def test_fp32_and_its_rounding_agree() -> None:
    full = torch.randn(20, 20)
    assert fingerprint({"w": full}) == fingerprint({"w": full.bfloat16()})


def test_does_not_depend_on_order_layout_or_gradients() -> None:
    plain = weights()
    reversed_order = dict(reversed(plain.items()))
    strided = {name: weight.T.contiguous().T for name, weight in plain.items()}
    trainable = {name: torch.nn.Parameter(weight) for name, weight in plain.items()}
    assert len({fingerprint(given) for given in (plain, reversed_order, strided, trainable)}) == 1


def test_changes_with_values_names_and_shapes() -> None:
    plain = weights()
    one_value = {**plain, "a": plain["a"].clone()}
    one_value["a"][0, 0] += 1
    renamed = {"a": plain["a"], "c": plain["b"]}
    reshaped = {**plain, "b": plain["b"].reshape(2, 5)}
    swapped = {"a": plain["b"], "b": plain["a"]}
    fewer = {"a": plain["a"]}
    given = (plain, one_value, renamed, reshaped, swapped, fewer, {})
    assert len({fingerprint(each) for each in given}) == len(given)
