"""Scores in few bits: hard masks at one bit a weight or less, soft masks as 8-bit or 4-bit offsets.

One tensor of scores becomes a few small ones, its parts, named by how they are coded:

    bits      uint8 (ceil(n / 8),)          entry i of the mask is bit i % 8 of byte i // 8; spare bits are 0
    deflate   uint8 (any,)                  `bits`, compressed as raw DEFLATE (RFC 1951)
    int8      int8  (..., rows, columns)    D = code * scale, codes -128 to 127
    int4      uint8 (..., rows, ceil(columns / 2))
                                            two codes -8 to 7 a byte, plus 8 each: an even column in the low half;
                                            a spare half is 8
    scale     bf16  (..., rows, ceil(columns / 64))
                                            the step of 64 neighbours in a row, beside int8 and int4
    shape     int64 (dimensions,)           of the scores, beside bits, deflate and int4

A scale is the smallest step whose codes reach all of its 64 offsets, so an offset is off by at most half a step and
zero stays zero. Shrinking the step to what minimises the squared error was tried: it clips the lowest gates, which
triples the largest error of m for a gain of 2 to 3 % in its root mean square.

Every flaw of parts raises AdapterError before anything of a declared size is allocated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from maskft.errors import AdapterError

GROUP = 64
"""Neighbours in a row that share a scale."""
CODINGS = ("bits", "deflate", "int8", "int4")
PARTS = (*CODINGS, "scale", "shape")
_DTYPES = {
    "bits": torch.uint8,
    "deflate": torch.uint8,
    "int8": torch.int8,
    "int4": torch.uint8,
    "scale": torch.bfloat16,
    "shape": torch.int64,
}
_COMPANIONS = {"bits": {"shape"}, "deflate": {"shape"}, "int8": {"scale"}, "int4": {"scale", "shape"}}

Parts = dict[str, Tensor]


def to_bits(kept: Tensor) -> Tensor:
    """A boolean mask of any shape as uint8 (ceil(n / 8),), coded as `bits` are."""
    padded = F.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    packed = torch.zeros_like(padded[:, 0])
    for bit in range(8):
        packed |= padded[:, bit] << bit
    return packed


def from_bits(packed: Tensor) -> Tensor:
    """What `to_bits` was given, flat, as ones and zeros in uint8, with the spare bits at its end."""
    return torch.stack([packed >> bit & 1 for bit in range(8)], dim=-1).flatten()


def pack_bits(kept: Tensor) -> Parts:
    """Parts of a boolean mask of any shape, compressed where that is smaller."""
    plain = to_bits(kept).cpu().numpy().tobytes()
    # Single bytes are best where cut entries lie at random, runs where few are cut. Searching for other repeats takes
    # a hundred times as long: it loses at a keep ratio of 0.9, and gains 7 % at 0.99.
    smaller = min((_deflated(plain, strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)), key=len)
    coding, content = ("deflate", smaller) if len(smaller) < len(plain) else ("bits", plain)
    return {coding: _bytes(content), "shape": torch.tensor(kept.shape)}


def pack_integers(offset: Tensor, bits: int) -> Parts:
    """Parts of offsets (..., rows, columns) in 8 or 4 bits each.

    Raises:
        AdapterError: an offset is not finite.
    """
    top = 2 ** (bits - 1) - 1
    groups = _grouped(offset.detach().float())
    reach = torch.maximum(groups.amax(-1) / top, groups.amin(-1) / -(top + 1))
    scale = reach.to(torch.bfloat16)
    if not torch.isfinite(scale).all():
        raise AdapterError("has values that are not finite")
    step = scale.float().unsqueeze(-1)
    codes = (groups / step.where(step > 0, 1.0)).round_().clamp_(-top - 1, top)
    codes = codes.flatten(-2)[..., : offset.shape[-1]]
    if bits == 8:
        return {"int8": codes.to(torch.int8), "scale": scale}
    halves = F.pad(codes.add_(8).to(torch.uint8), (0, offset.shape[-1] % 2), value=8)
    return {"int4": halves[..., ::2] | halves[..., 1::2] << 4, "scale": scale, "shape": torch.tensor(offset.shape)}


def coding_of(parts: Mapping[str, Tensor]) -> str:
    """Which of CODINGS the parts are in.

    Raises:
        AdapterError: a part is missing, unknown, or one too many.
    """
    codings = [name for name in CODINGS if name in parts]
    if len(codings) != 1:
        found = ", ".join(sorted(parts))
        raise AdapterError(f"has the parts {found}, where exactly one of {', '.join(CODINGS)} is needed")
    coding = codings[0]
    wanted = {coding, *_COMPANIONS[coding]}
    if set(parts) != wanted:
        raise AdapterError(f"has the parts {', '.join(sorted(parts))}; {coding} needs {', '.join(sorted(wanted))}")
    return coding


def packed_shape(parts: Mapping[str, Tensor]) -> torch.Size:
    """The shape of the scores that the parts were made of, as they declare it.

    Raises:
        AdapterError: parts are missing, or of the wrong dtype or shape.
    """
    coding = coding_of(parts)
    for name, part in parts.items():
        if part.dtype != _DTYPES[name]:
            raise AdapterError(f"has a part {name} of dtype {part.dtype}, not {_DTYPES[name]}")
    declared = _declared(torch.tensor(parts["int8"].shape) if coding == "int8" else parts["shape"])
    *rows, columns = declared
    if "scale" in parts and parts["scale"].shape != (*rows, math.ceil(columns / GROUP)):
        raise AdapterError(f"has scales of shape {tuple(parts['scale'].shape)} for scores of shape {tuple(declared)}")
    if coding == "int4" and parts["int4"].shape != (*rows, math.ceil(columns / 2)):
        raise AdapterError(f"has codes of shape {tuple(parts['int4'].shape)} for scores of shape {tuple(declared)}")
    length = math.ceil(declared.numel() / 8)
    if coding == "bits" and parts["bits"].shape != (length,):
        raise AdapterError(f"has {parts['bits'].numel()} bytes of bits where {length} are needed")
    if coding == "deflate" and (parts["deflate"].dim() != 1 or length > 1032 * parts["deflate"].numel()):
        # 1032 is the most DEFLATE can compress by
        raise AdapterError(f"has {parts['deflate'].numel()} compressed bytes, which cannot hold {length}")
    return declared


def unpack(parts: Mapping[str, Tensor]) -> Tensor:
    """What was packed: a boolean mask, or offsets in fp32.

    Raises:
        AdapterError: the parts have a flaw.
    """
    shape = packed_shape(parts)
    coding = coding_of(parts)
    if coding in ("bits", "deflate"):
        return _unpack_bits(parts[coding], shape, compressed=coding == "deflate")
    if not torch.isfinite(parts["scale"]).all():
        raise AdapterError("has scales that are not finite")
    codes = parts[coding]
    if coding == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., : shape[-1]].to(torch.int8) - 8
    groups = _grouped(codes.float())
    return groups.mul_(parts["scale"].float().unsqueeze(-1)).flatten(-2)[..., : shape[-1]].contiguous()


def _unpack_bits(content: Tensor, shape: torch.Size, *, compressed: bool) -> Tensor:
    count = shape.numel()
    length = math.ceil(count / 8)
    if compressed:
        content = _bytes(_inflated(content.cpu().numpy().tobytes(), length)).to(content.device)
    bits = from_bits(content)
    if bits[count:].any():
        raise AdapterError("has spare bits that are not 0")
    return bits[:count].bool().view(shape)


def _deflated(content: bytes, strategy: int) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return encoder.compress(content) + encoder.flush()


def _inflated(content: bytes, length: int) -> bytes:
    """Decompress `content`, which must hold exactly `length` bytes; never allocates much more than that."""
    decoder = zlib.decompressobj(-15)
    try:
        inflated = decoder.decompress(content, length + 1)
    except zlib.error as error:
        raise AdapterError(f"has compressed bits that cannot be read ({error})") from error
    if len(inflated) != length or not decoder.eof or decoder.unused_data:
        raise AdapterError(f"has compressed bits that do not hold exactly {length} bytes")
    return inflated


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def _declared(shape: Tensor) -> torch.Size:
    sizes = shape.tolist() if shape.dim() == 1 else []
    if not 1 <= len(sizes) <= 8 or min(sizes) < 1 or math.prod(sizes) >= 2**63:
        raise AdapterError(f"declares the impossible shape {tuple(shape.flatten()[:9].tolist())}")
    return torch.Size(sizes)


def _grouped(x: Tensor) -> Tensor:
    """(..., columns) -> (..., groups, GROUP), filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % GROUP)).reshape(*x.shape[:-1], -1, GROUP)
