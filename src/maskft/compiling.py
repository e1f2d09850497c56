"""Element-wise code compiled by torch.compile: one pass over the tensors in place of one per operation.

One source serves CPU and CUDA. Where no compiler is found, or the tensors are not real ones (tracing, meta), the
function runs as it is written; that is said once, in the log.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)
around: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar("around", default=nullcontext)
"""Makes the context in which functions run as written on tensors without data. Who counts memory can then leave out
what compiled code would not write down."""


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled when it is first called with tensors of a device that has a compiler.

    Shapes are left open, so that one compilation serves every layer of a model. The function must not look at the
    values of its tensors, and its other arguments must be few: each value of them is compiled anew. Results have no
    gradient.
    """

    @functools.cache
    def fast(*kind: Any) -> Callable[P, R]:
        # dynamo counts compilations by code object and gives up at eight: each kind of arguments has its own
        code = function.__code__.replace(co_name=f"{function.__name__}_of_{len(kind)}")
        copy = types.FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        result: Callable[P, R] = torch.compile(copy, fullgraph=True, dynamic=True)
        return result

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not all(map(_is_real, args)):
            with around.get()():
                return function(*args, **kwargs)
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        if not has_compiler(tensor.device.type):
            return function(*args, **kwargs)
        return fast(*map(_kind, args))(*map(_plain, args), **kwargs)

    return call


def _kind(argument: Any) -> Any:
    """What tells arguments apart for which code is compiled anew; shapes don't, but for squares."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device.type
    if dataclasses.is_dataclass(argument):  # may have tensors, whose values don't matter
        return type(argument), *(_kind(getattr(argument, field.name)) for field in dataclasses.fields(argument))
    return argument


def _plain(argument: Any) -> Any:
    """Tensors without a gradient, so that parameters and others are of one kind."""
    learnt = type(argument) is torch.nn.Parameter or getattr(argument, "requires_grad", False)
    return argument.detach() if learnt else argument


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
