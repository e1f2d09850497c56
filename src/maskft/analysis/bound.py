"""How far the error of a fine-tuned model can lie above its training error, by the bits that tell it from its base.

Occam's bound, derived in docs/theory.md: with probability 1 - delta over a sample of n independent examples, every
adapter that is written in b bits of a prefix code has

    kl(training error || error) <= (b ln 2 + ln(1 / delta)) / n

and so error <= training error + sqrt of half of that (Hoeffding). The base, the method and its settings must not depend
on the sample. Errors are of the adapter as it is written, so after packing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskft.errors import AdapterError
from maskft.tuner.attach import unreadable
from maskft.tuner.packed import split_part
from maskft.tuner.settings import CONFIG, WEIGHTS

_STEPS = 200
"""Halvings of an interval; 64-bit numbers need fewer."""


@dataclass(frozen=True)
class Bound:
    """What the bound says of one adapter.

    Attributes:
        bits: length of its code.
        examples: n, independent ones: images, where several questions share one.
        training_error: mean over them, in [0, 1].
        delta: how likely the bound is to fail.
        rate: (bits ln 2 + ln(1 / delta)) / n, in nats an example.
        hoeffding: training error + sqrt(rate / 2); above 1 it says nothing.
        kl: the sharper form, always below 1 but for a training error of 1.
    """

    bits: float
    examples: int
    training_error: float
    delta: float
    rate: float
    hoeffding: float
    kl: float


def occam_bound(bits: float, examples: int, training_error: float, delta: float = 0.05) -> Bound:
    """Both forms of the bound.

    Raises:
        ValueError: no examples, an error or a delta outside [0, 1], or fewer than 0 bits.
    """
    _require(bits >= 0 and examples >= 1, "bits must be 0 or more, examples 1 or more")
    _require(0 <= training_error <= 1 and 0 < delta <= 1, "an error and delta lie within 0 and 1")
    rate = _nats(bits, delta) / examples
    return Bound(
        bits=bits,
        examples=examples,
        training_error=training_error,
        delta=delta,
        rate=rate,
        hoeffding=training_error + math.sqrt(rate / 2),
        kl=kl_inverse(training_error, rate),
    )


def examples_needed(bits: float, training_error: float, target: float, delta: float = 0.05) -> int:
    """The fewest examples with which the sharper bound is at most `target`, for the same bits and training error.

    Raises:
        ValueError: the target is not above the training error and below 1.
    """
    _require(0 <= training_error < target < 1, "the target must lie above the training error and below 1")
    return math.ceil(_nats(bits, delta) / bernoulli_kl(training_error, target))


def most_bits(examples: int, training_error: float, target: float, delta: float = 0.05) -> float:
    """The longest code with which the sharper bound is at most `target`; below 0 where no code is short enough."""
    return (examples * bernoulli_kl(training_error, target) + math.log(delta)) / math.log(2)


def bernoulli_kl(q: float, p: float) -> float:
    """kl(q || p) = q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)), in nats, between coins that fall with q and p."""

    def term(a: float, b: float) -> float:
        return 0.0 if a == 0 else math.inf if b == 0 else a * math.log(a / b)

    return max(0.0, term(q, p) + term(1 - q, 1 - p))  # rounding can leave a little less than 0


def kl_inverse(q: float, rate: float) -> float:
    """The largest p in [q, 1] with kl(q || p) <= rate, from above."""
    low, high = q, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if bernoulli_kl(q, middle) <= rate:
            low = middle
        else:
            high = middle
    return high


def integer_bits(number: int) -> int:
    """Length of Elias' gamma code of a whole number from 0 on: 2 floor(log2(number + 1)) + 1."""
    return 2 * (number + 1).bit_length() - 1


def choice_bits(total: int, chosen: int) -> float:
    """Bits that say which `chosen` of `total` weights a hard mask cuts, their number included."""
    _require(0 <= chosen <= total, "no more can be chosen than there are")
    ways = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return integer_bits(chosen) + math.ceil(max(0.0, ways) / math.log(2))


def learnt_bits(folder: Path, weights: str = WEIGHTS, settings: str = CONFIG) -> dict[str, int]:
    """Length of a prefix code of what a run learnt, in bits: {"tensors", "settings", "total"}.

    Each tensor is its bytes, or these deflated where that is shorter (1 bit says which), behind its length in Elias'
    gamma code. Names, shapes and dtypes follow from the settings and the base. The settings are their file, deflated.

    Args:
        folder: a saved adapter's or a run's.
        weights, settings: the files' names.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    path = folder / weights
    if not path.is_file() or not (folder / settings).is_file():
        raise AdapterError(f"{folder} has not been trained to its end: {weights} or {settings} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in sorted(file.keys()) if split_part(name)[1] != "shape"]
            tensors = sum(_text_bits(_content(file.get_tensor(name))) for name in names)
    except SafetensorError as error:
        raise unreadable(path, error) from error
    told = _text_bits((folder / settings).read_bytes())
    return {"tensors": tensors, "settings": told, "total": tensors + told}


def _content(tensor: Tensor) -> bytes:
    content: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def _text_bits(content: bytes) -> int:
    length = min(len(content), len(zlib.compress(content, 6)))
    return 1 + integer_bits(length) + 8 * length


def image_errors(records: Sequence[Mapping[str, object]], scores: Sequence[float]) -> list[float]:
    """Mean error of each image's questions, from answers' records and their scores in [0, 1].

    Questions about one image are not independent of each other; images are.
    """
    by_image: dict[str, list[float]] = {}
    for number, (record, score) in enumerate(zip(records, scores, strict=True)):
        name = record.get("group") or record.get("image") or f"row {number}"
        by_image.setdefault(str(name), []).append(1 - score)
    return [math.fsum(errors) / len(errors) for errors in by_image.values()]


def _nats(bits: float, delta: float) -> float:
    return bits * math.log(2) - math.log(delta)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
