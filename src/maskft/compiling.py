"""Element-wise code compiled by torch.compile: one pass over the tensors in place of one per operation.

One source serves CPU and CUDA. Where no compiler is found, or the tensors are not real ones (tracing, meta), the
function runs as it is written; that is said once, in the log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled when it is first called with tensors of a device that has a compiler.

    Shapes are left open, so that one compilation serves every layer of a model. The function must not look at the
    values of its tensors, and its other arguments must be few: each value of them is compiled anew. Results have no
    gradient.
    """
    fast = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=True))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not all(map(_is_real, args)):
            return function(*args, **kwargs)
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        if not has_compiler(tensor.device.type):
            return function(*args, **kwargs)
        plain: Any = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]  # parameters as other tensors
        with torch._dynamo.config.patch(recompile_limit=64):  # gates, dtypes, square and other matrices
            result: R = fast()(*plain, **kwargs)
            return result

    return call


def _is_real(argument: Any) -> bool:
    """Whether an argument is a plain tensor with data, or none at all."""
    if not isinstance(argument, Tensor):
        return True
    return type(argument) in (Tensor, torch.nn.Parameter) and not argument.is_meta


@functools.cache
def has_compiler(device_type: str) -> bool:
    """Whether torch.compile can make code for a device here, by trying; where it cannot, the log says so once."""
    probe = torch.ones(16, device=device_type)
    try:
        torch.compile(torch.neg, fullgraph=True)(probe)
    except Exception as error:  # no compiler, no Python headers, no Triton: each has an exception of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("torch.compile does not work here, so masks take more time and memory (%s)", reason)
        return False
    return True
