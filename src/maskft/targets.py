"""Which modules are masked: by part of the model, kind of layer and depth, found from the model's structure.

A part is recognised by the names Transformers gives it; within the language model and the vision encoder, layers
are the numbered children of a module list, attention and feed-forward projections are told apart by their names.
Embeddings, norms, the output head and children of `nn.MultiheadAttention` (which reads its projection's weight
without calling it) are never masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from maskft.errors import ModelError

SCOPES = ("language", "projector", "vision")
MODULES = ("attn", "mlp", "both")

PARTS = {
    "projector": {
        "multi_modal_projector",
        "mm_projector",
        "connector",
        "merger",
        "deepstack_merger_list",
        "mlp1",
        "language_projection",
    },
    "vision": {"vision_tower", "vision_model", "visual", "vision_encoder", "image_tower"},
    "language": {"language_model", "text_model", "llm"},
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "qkv", "query", "key", "value", "c_attn"}
_ATTENTION |= {"query_key_value", "proj", "projection", "projection_layer", "attention.dense"}
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "linear_fc1", "linear_fc2"}
_MLP |= {"w1", "w2", "w3", "dense_h_to_4h", "dense_4h_to_h", "dense"}
_STACKED = {"qkv_proj", "qkv", "c_attn", "gate_up_proj"}
_HEADS = {"lm_head", "embed_out", "classifier", "score"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")


def resolve_targets(
    model: nn.Module,
    *,
    scope: Sequence[str] = ("language", "projector"),
    modules: str = "both",
    layers: str | Sequence[int] = "all",
) -> list[str]:
    """Names of the linear layers to mask, in the model's order.

    Args:
        model: any module; a model without a vision encoder or projector counts as a language model.
        scope: parts of the model, any of "language", "projector", "vision".
        modules: "attn" (q, k, v, o), "mlp" (gate, up, down or fc1, fc2) or "both"; does not apply to the projector,
            which is masked whole.
        layers: "all", "first-third", "middle-third", "last-third", ranges such as "0-3,8", or a list of indices;
            counted in the language model and the vision encoder each.

    Raises:
        ModelError: a scope, kind or range that is not known, or that matches nothing in this model.
    """
    unknown = [part for part in scope if part not in SCOPES]
    if unknown or not scope:
        raise ModelError(f"scope is {list(scope)}; each part must be one of {', '.join(SCOPES)}, and one is needed.")
    if modules not in MODULES:
        raise ModelError(f"modules is '{modules}'; it must be one of {', '.join(MODULES)}.")

    linears = [(name, _part(name)) for name in _linear_layers(model)]
    if not any(part in ("projector", "vision") for _, part in linears):
        linears = [(name, "language") for name, _ in linears]
    depth = {part: _depth(name for name, p in linears if p == part) for part in ("language", "vision")}
    chosen = {part: _layer_indices(layers, n, part) for part, n in depth.items() if part in scope and n}
    kinds = (_ATTENTION if modules != "mlp" else set()) | (_MLP if modules != "attn" else set())

    targets = []
    for name, part in linears:
        if part not in scope:
            continue
        if part == "projector":
            targets.append(name)
            continue
        index = _layer_index(name)
        if index is not None and index in chosen[part] and _kind(name) in kinds:
            targets.append(name)
    if not targets and not resolve_parameters(model, scope=scope, modules=modules, layers=layers):
        found = ", ".join(f"{part} ({sum(p == part for _, p in linears)})" for part in SCOPES)
        raise ModelError(
            f"nothing to mask: scope {list(scope)}, modules '{modules}', layers {layers!r} match no linear layer of "
            f"{type(model).__name__}. Its linear layers by part: {found}. Name them with target_modules instead."
        )
    return targets


def resolve_parameters(
    model: nn.Module,
    *,
    scope: Sequence[str] = ("language", "projector"),
    modules: str = "both",
    layers: str | Sequence[int] = "all",
) -> list[str]:
    """Names of the experts' parameters (experts, out, in) to mask; the arguments are those of `resolve_targets`.

    Transformers keeps a mixture of experts as 3-D parameters of one module, which no linear layer holds.
    """
    if modules == "attn":
        return []
    names = [
        name.replace(".base_layer", "")
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and name.rsplit(".", 1)[-1] in _MLP and _layer_index(name) is not None
    ]
    parts = {name: _part(name) for name in names}
    if "language" not in set(map(_part, _linear_layers(model))):
        parts = dict.fromkeys(names, "language")
    chosen = {
        part: _layer_indices(layers, _depth(n for n, p in parts.items() if p == part), part)
        for part in set(parts.values()) & set(scope)
    }
    return [name for name, part in parts.items() if part in chosen and _layer_index(name) in chosen[part]]


def fused_heights(name: str, weight: Any, parent: nn.Module) -> tuple[int, ...]:
    """Heights of the matrices that are stacked in one weight (out, in): q, k, v or gate, up; empty for any other.

    Args:
        name: the layer's own name.
        weight: its weight; GPT-2's c_attn lies as (in, out).
        parent: the module around it, which knows the number of heads.
    """
    if name not in _STACKED or not hasattr(weight, "shape"):
        return ()
    rows = weight.shape[-1] if name == "c_attn" else weight.shape[-2]
    if name == "gate_up_proj":
        return (rows // 2,) * 2
    config = getattr(parent, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(parent, "num_heads", None) or 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not heads or rows % (heads + 2 * groups):
        return (rows // 3,) * 3 if rows % 3 == 0 else ()
    head = rows // (heads + 2 * groups)
    return heads * head, groups * head, groups * head


def _linear_layers(model: nn.Module) -> list[str]:
    inside_attention = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
    )
    names = [
        name.removesuffix(".base_layer")  # where an adapter wraps the layer already
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside_attention or ("\0",))
    ]
    return [name for name in names if name.rsplit(".", 1)[-1] not in _HEADS]


def _part(name: str) -> str:
    """Part of the model a module name belongs to; a projector inside the vision encoder counts as projector."""
    path = set(name.split("."))
    for part, names in PARTS.items():
        if path & names:
            return part
    return "other"


def _kind(name: str) -> str:
    """The module's own name; `dense`, which both kinds use, is told apart by the module around it."""
    *path, own = name.split(".")
    return "attention.dense" if own == "dense" and any("att" in piece for piece in path[-2:]) else own


def _layer_index(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def _depth(names: Iterable[str]) -> int:
    return max((index + 1 for name in names if (index := _layer_index(name)) is not None), default=0)


def _layer_indices(layers: str | Sequence[int], depth: int, part: str) -> set[int]:
    """The chosen indices among the `depth` layers of `part`."""
    thirds = {"first-third": 0, "middle-third": 1, "last-third": 2}
    if layers == "all":
        return set(range(depth))
    if isinstance(layers, str) and layers in thirds:
        third = thirds[layers]
        return set(range(round(depth * third / 3), round(depth * (third + 1) / 3)))
    if isinstance(layers, str):
        indices: set[int] = set()
        for piece in layers.replace(" ", "").split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
            if not match or int(match.group(1)) > int(match.group(2) or match.group(1)):
                raise ModelError(
                    f"layers is '{layers}'; it must be 'all', 'first-third', 'middle-third', 'last-third', ranges such "
                    "as '0-3,8', or a list of indices."
                )
            first, last = int(match.group(1)), int(match.group(2) or match.group(1))
            indices |= set(range(first, last + 1))
    else:
        indices = set(layers)
    outside = sorted(i for i in indices if not 0 <= i < depth)
    if outside:
        raise ModelError(f"layers names {outside[:5]}, but the {part} part has layers 0 to {depth - 1}.")
    return indices
