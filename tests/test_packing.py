"""Masks as bits come back as they were, offsets within half a step, and a damaged part is refused."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskft.errors import AdapterError
from maskft.packing import CODINGS, GROUP, PARTS, coding_of, pack_bits, pack_integers, packed_shape, unpack

shapes = st.lists(st.integers(1, 5), max_size=2).flatmap(lambda lead: st.integers(1, 150).map(lambda n: (*lead, n)))


def numbers(shape: tuple[int, ...], seed: int, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def size(parts: dict[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


class TestBits:
    @given(shapes, st.floats(0, 1), st.integers(0, 99))
    def test_round_trip(self, shape: tuple[int, ...], keep: float, seed: int) -> None:
        kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep
        parts = pack_bits(kept)
        assert set(parts) in ({"bits", "shape"}, {"deflate", "shape"})
        assert packed_shape(parts) == kept.shape
        again = unpack(parts)
        assert again.dtype == torch.bool
        assert torch.equal(again, kept)

    @pytest.mark.parametrize("shape", [(8,), (7,), (9,), (3, 5), (2, 3, 5), (1, 1)], ids=str)
    @pytest.mark.parametrize("value", [True, False])
    def test_all_kept_and_all_cut(self, shape: tuple[int, ...], value: bool) -> None:
        kept = torch.full(shape, value)
        assert torch.equal(unpack(pack_bits(kept)), kept)

    def test_layout_of_the_bytes(self) -> None:
        kept = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
        parts = pack_bits(kept)
        assert parts["bits"].tolist() == [0b1000_0001, 0b0000_0010]
        assert parts["shape"].tolist() == [2, 5]

    def test_a_view_that_is_not_contiguous(self) -> None:
        kept = torch.rand(17, 33) < 0.7
        assert torch.equal(unpack(pack_bits(kept.mT)), kept.mT)

    @pytest.mark.parametrize(("keep", "most"), [(0.5, 1.001), (0.9, 0.485), (0.95, 0.31), (0.99, 0.125), (1.0, 0.005)])
    def test_bits_per_weight(self, keep: float, most: float) -> None:
        """A twentieth above the entropy at 0.5 to 0.95, half above at 0.99."""
        kept = torch.rand(1536, 576) < keep
        parts = pack_bits(kept)
        assert coding_of(parts) == ("bits" if keep == 0.5 else "deflate")
        assert 8 * size(parts) / kept.numel() < most


class TestIntegers:
    @given(shapes, st.integers(0, 99), st.floats(1e-20, 1e20), st.sampled_from([4, 8]))
    def test_an_offset_is_off_by_at_most_half_a_step(
        self, shape: tuple[int, ...], seed: int, std: float, bits: int
    ) -> None:
        offset = numbers(shape, seed, std)
        parts = pack_integers(offset, bits)
        assert packed_shape(parts) == offset.shape
        again = unpack(parts)
        assert again.dtype == torch.float32
        step = parts["scale"].float().repeat_interleave(GROUP, -1)[..., : shape[-1]]
        assert ((again - offset).abs() <= step * 0.5001).all()

    @pytest.mark.parametrize("bits", [4, 8])
    def test_zero_stays_zero_and_groups_keep_to_themselves(self, bits: int) -> None:
        offset = torch.zeros(3, 2 * GROUP + 5)
        offset[1, GROUP : 2 * GROUP] = 7.0
        offset[2, -1] = -1e-3
        again = unpack(pack_integers(offset, bits))
        assert torch.equal(again == 0, offset == 0)
        torch.testing.assert_close(again, offset, rtol=0.005, atol=0)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_every_code_is_used(self, bits: int) -> None:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = torch.arange(low, high + 1).float()
        offset = torch.nn.functional.pad(codes, (0, -codes.numel() % GROUP)).view(-1, GROUP)
        offset[:, -1] = low  # one scale for all groups
        assert torch.equal(unpack(pack_integers(offset, bits)), offset)

    def test_layout_of_the_bytes(self) -> None:
        parts = pack_integers(torch.tensor([[7.0, -8.0, 1.0]]), 4)
        assert parts["int4"].tolist() == [[15 | 0 << 4, 9 | 8 << 4]]
        assert parts["scale"].tolist() == [[1.0]]
        assert parts["shape"].tolist() == [1, 3]
        assert pack_integers(torch.tensor([[127.0, -128.0]]), 8)["int8"].tolist() == [[127, -128]]

    @pytest.mark.parametrize(("bits", "most"), [(4, 4.26), (8, 8.26)])
    @pytest.mark.parametrize("columns", [576, 1536, 192])
    def test_bits_per_weight(self, bits: int, most: float, columns: int) -> None:
        offset = numbers((192, columns), 0)
        assert 8 * size(pack_integers(offset, bits)) / offset.numel() < most

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bits: int, value: float) -> None:
        offset = torch.zeros(2, 3)
        offset[1, 2] = value
        with pytest.raises(AdapterError, match="not finite"):
            pack_integers(offset, bits)

    def test_leaves_its_argument_alone(self) -> None:
        offset = numbers((4, GROUP), 0).requires_grad_()
        before = offset.detach().clone()
        assert not any(part.requires_grad for part in pack_integers(offset, 4).values())
        assert torch.equal(offset, before)


def bits() -> dict[str, Tensor]:
    return {"bits": torch.tensor([1, 2], dtype=torch.uint8), "shape": torch.tensor([2, 5])}


def deflate(content: bytes = bytes(200), shape: tuple[int, ...] = (40, 40)) -> dict[str, Tensor]:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = encoder.compress(content) + encoder.flush()
    return {"deflate": torch.tensor(list(packed), dtype=torch.uint8), "shape": torch.tensor(shape)}


def int4() -> dict[str, Tensor]:
    return pack_integers(numbers((3, 70), 0), 4)


def int8() -> dict[str, Tensor]:
    return pack_integers(numbers((3, 70), 0), 8)


def without(parts: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {part: tensor for part, tensor in parts.items() if part != name}


def shape(*sizes: int) -> dict[str, Tensor]:
    return {"shape": torch.tensor(sizes)}


FLAWS = {
    "no coding": (shape(2, 5), "exactly one of"),
    "two codings": (bits() | deflate(), "exactly one of"),
    "no shape": (without(bits(), "shape"), "bits needs bits, shape"),
    "scale too many": (bits() | {"scale": torch.ones(2, 1)}, "bits needs"),
    "int4 without scale": (without(int4(), "scale"), "int4 needs int4, scale, shape"),
    "wrong dtype of bits": (bits() | {"bits": torch.zeros(2)}, "dtype torch.float32, not torch.uint8"),
    "wrong dtype of shape": (bits() | {"shape": torch.tensor([2.0, 5.0])}, "not torch.int64"),
    "wrong dtype of scale": (int8() | {"scale": torch.ones(3, 2)}, "not torch.bfloat16"),
    "too few bytes": (bits() | {"bits": torch.zeros(1, dtype=torch.uint8)}, "1 bytes of bits where 2 are needed"),
    "too many bytes": (bits() | {"bits": torch.zeros(3, dtype=torch.uint8)}, "3 bytes of bits where 2"),
    "bytes of two dimensions": (bits() | {"bits": torch.zeros(1, 2, dtype=torch.uint8)}, "bytes of bits"),
    "spare bits": (bits() | {"bits": torch.tensor([1, 4], dtype=torch.uint8)}, "spare bits"),
    "negative size": (bits() | shape(-2, 5), "impossible shape"),
    "empty": (bits() | shape(0, 5), "impossible shape"),
    "no dimensions": (bits() | {"shape": torch.zeros(0, dtype=torch.int64)}, "impossible shape"),
    "shape of two dimensions": (bits() | {"shape": torch.ones(1, 2, dtype=torch.int64)}, "impossible shape"),
    "overflowing shape": (bits() | shape(2**62, 2**62), "impossible shape"),
    "too many dimensions": (bits() | shape(*[1] * 9), "impossible shape"),
    "int8 of no dimensions": (int8() | {"int8": torch.tensor(1, dtype=torch.int8)}, "impossible shape"),
    "scales of another shape": (
        int8() | {"scale": torch.ones(3, 1, dtype=torch.bfloat16)},
        r"scales of shape \(3, 1\) for scores of shape \(3, 70\)",
    ),
    "codes of another shape": (int4() | shape(3, 72), r"codes of shape \(3, 35\) for scores of shape \(3, 72\)"),
    "scale not finite": (
        int8() | {"scale": torch.full((3, 2), math.nan, dtype=torch.bfloat16)},
        "scales that are not finite",
    ),
    "bomb": (deflate(bytes(10**6)), "do not hold exactly 200 bytes"),
    "shape larger than deflate can hold": (deflate(shape=(10**6, 10**6)), "which cannot hold 125000000000"),
    "inflates to too little": (deflate(bytes(199)), "do not hold exactly 200 bytes"),
    "truncated": (deflate() | {"deflate": deflate()["deflate"][:-2]}, "do not hold exactly"),
    "bytes after the end": (
        deflate() | {"deflate": torch.cat([deflate()["deflate"], torch.ones(3, dtype=torch.uint8)])},
        "do not hold exactly",
    ),
    "no deflate at all": (deflate() | {"deflate": torch.full((20,), 255, dtype=torch.uint8)}, "cannot be read"),
    "compressed spare bits": (deflate(b"\xff" * 200, (1599,)), "spare bits"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_is_refused(name: str) -> None:
    parts, message = FLAWS[name]
    with pytest.raises(AdapterError, match=message):
        unpack(parts)


def test_what_the_flaws_are_made_of_is_sound() -> None:
    for parts in (bits(), deflate(), int4(), int8()):
        assert unpack(parts).shape == packed_shape(parts)


def test_names() -> None:
    assert set(CODINGS) < set(PARTS)
    assert {coding_of(parts) for parts in (bits(), deflate(), int4(), int8())} == set(CODINGS)
