"""What is trained without an adapter: the projector, or all weights of parts of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from maskft.errors import ModelError
from maskft.targets import SCOPES, named_part, projector_names, resolve_parameters, resolve_targets


def find_projector(model: Any) -> Any:
    """The module between vision encoder and language model; a `ModuleDict` of them where there are several.

    Raises:
        ModelError: the model has none by a known name.
    """
    modules = {name.replace(".", "/"): model.get_submodule(name) for name in find_projector_names(model)}
    return next(iter(modules.values())) if len(modules) == 1 else nn.ModuleDict(modules)


def find_projector_names(model: Any) -> list[str]:
    """Names of the modules between vision encoder and language model.

    Raises:
        ModelError: the model has none by a known name.
    """
    if names := projector_names(model):
        return names
    raise ModelError(
        f"{type(model).__name__} has no projector by a known name. Its parts: "
        f"{', '.join(name for name, _ in model.named_children())}."
    )


def whole_parameters(
    model: nn.Module,
    *,
    scope: Sequence[str] = ("language", "projector"),
    modules: str = "all",
    layers: str | Sequence[int] = "all",
    target_modules: Sequence[str] | str | None = None,
) -> list[str]:
    """Names of the parameters that full fine-tuning trains, in the model's order.

    Args:
        model: any model; where nothing in it is called vision or projector, all of it is the language model.
        scope: parts of the model, any of "language", "projector", "vision".
        modules: "all" is every parameter of the parts; "attn", "mlp" and "both" the weights that masks would be put on.
        layers: for "attn", "mlp" and "both", as `maskft.targets.resolve_targets` has them.
        target_modules: names of modules or the ends of them, a regular expression, or "all-linear"; all parameters of
            what matches, in place of the above.

    Raises:
        ModelError: nothing matches.
    """
    if target_modules is not None:
        found = set(_matching(model, target_modules))
    elif modules != "all":
        where: dict[str, Any] = {"scope": scope, "modules": modules, "layers": layers}
        found = {f"{name}.weight" for name in resolve_targets(model, **where)} | set(resolve_parameters(model, **where))
    else:
        found = _of_parts(model, scope)
    return [name for name, _ in model.named_parameters() if name in found]


def train_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze the model but for the named parameters, which are kept in fp32, where small steps keep their resolution.

    Computations of a model in bf16 are autocast to it, so that only sums and steps of weights are in fp32.
    """
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].data = parameters[name].data.float()
        parameters[name].requires_grad_(True)


def _of_parts(model: nn.Module, scope: Sequence[str]) -> set[str]:
    unknown = [part for part in scope if part not in SCOPES]
    if unknown or not scope:
        raise ModelError(f"scope is {list(scope)}; each part must be one of {', '.join(SCOPES)}, and one is needed.")
    parts = {name: named_part(name) for name, _ in model.named_parameters()}
    wanted = {"other" if part == "language" else part for part in scope}  # nothing around the language model names it
    present = {"language" if part == "other" else part for part in parts.values()}
    alone = {"projector"} if "language" in scope and "vision" not in present else set()  # a language model by itself
    missing = [part for part in scope if part not in present | alone]
    if missing:
        raise ModelError(f"{type(model).__name__} has no part {' and no part '.join(missing)} by a known name.")
    return {name for name, part in parts.items() if part in wanted}


def _matching(model: nn.Module, given: Sequence[str] | str) -> Iterable[str]:
    if isinstance(given, str) and given != "all-linear":
        chosen = [name for name, _ in model.named_modules() if re.fullmatch(given, name)]
    elif isinstance(given, str):
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    else:
        ends = tuple(f".{one}" for one in given)
        chosen = [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]
    found = [f"{name}.{own}" for name in chosen for own, _ in model.get_submodule(name).named_parameters()]
    if not found:
        raise ModelError(f"target_modules {given!r} match no module with parameters in {type(model).__name__}.")
    return found
