"""Quantised layers that cannot be masked, known by the names of their classes, so that no library is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

from maskft.errors import ModelError

MASKABLE = "Load the base in bf16, or quantised by bitsandbytes (8-bit, nf4 or fp4) or torchao (int8 weight-only)"
_FOREIGN = {
    "AWQ": r"awq",
    "AutoRound": r"auto_round",
    "GPTQ": r"gptq|\.QuantLinear$",
    "AQLM": r"^aqlm\.",
    "EETQ": r"eetq",
    "HQQ": r"^hqq\.",
    "GGUF": r"\.gguf\.",
    "BitNet": r"\.bitnet\.",
    "HIGGS": r"\.higgs\.",
    "VPTQ": r"^vptq\.",
    "SpQR": r"^spqr",
    "FP8": r"\.(?:finegrained_fp8|fbgemm_fp8)\.",
    "FP-Quant": r"^fp_quant\.",
    "MXFP4": r"\.mxfp4\.",
    "NVFP4": r"\.nvfp4\.",
    "Four Over Six": r"^fouroversix\.",
    "SINQ": r"^sinq\.",
    "Metal": r"\.metal_quantization\.",
    "Gemma's quantisation": r"\.gemma_quant\.",
    "compressed-tensors": r"compressed_tensors\.",
    "Quanto": r"^optimum\.quanto\.",
    "Quark": r"^quark\.",
    "Intel Neural Compressor": r"^neural_compressor\.",
    "Transformer Engine": r"^transformer_engine\.",
}
"""Schemes without masked layers, by a pattern of "module.Class"."""


def foreign_scheme(module: nn.Module) -> str | None:
    """Name of the scheme a layer is quantised in, if it is one without masked layers."""
    kind: Any = type(module)
    return _foreign_class(kind) or (kind.__name__ if hasattr(module, "qweight") or hasattr(module, "W_q") else None)


def foreign_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and schemes of the quantised layers that cannot be masked."""
    for name, module in model.named_modules():
        if not any(module.children()) and (scheme := foreign_scheme(module)):
            yield name, scheme


def refuse_foreign(module: nn.Module, name: str) -> None:
    """Raise ModelError, naming the scheme, for a quantised layer that cannot be masked."""
    if scheme := foreign_scheme(module):
        _refuse(name, scheme)


def refuse_foreign_layers(model: nn.Module, beside: Iterable[str] | None = None) -> None:
    """Raise ModelError for the first quantised layer that cannot be masked, if there is one.

    Such layers are seldom nn.Linear, so the search for layers to mask passes over them.

    Args:
        model: where to look.
        beside: names of layers; look only in the stacks of layers that these lie in.
    """
    stacks = None if beside is None else {_stack(name) for name in beside}
    for name, scheme in foreign_layers(model):
        if stacks is None or _stack(name) in stacks:
            _refuse(name, scheme)


def _refuse(name: str, scheme: str) -> None:
    raise ModelError(
        f"'{name}' cannot be masked: it is quantised with {scheme}, which gives masks no gradient or no full weight. "
        f"{MASKABLE}."
    )


@cache
def _foreign_class(kind: Any) -> str | None:
    names = [f"{base.__module__}.{base.__name__}" for base in kind.__mro__]
    matches = (s for s, pattern in _FOREIGN.items() if any(re.search(pattern, n, re.IGNORECASE) for n in names))
    return next(matches, None)


def _stack(name: str) -> str:
    """The part of a name before the number of its layer."""
    return re.split(r"\.\d+(?:\.|$)", name)[0]
