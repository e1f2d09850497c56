"""Which weights are masked: by part of the model, kind of layer and depth, found from the model's structure.

- The language model is the stack of numbered layers nearest to the token embedding.
- The vision encoder is recognised by name, and so is the projector, also where it lies inside the encoder.
- Everything else, such as an audio encoder or a Q-Former, belongs to no part and is masked by no scope.

Within a layer, attention and feed-forward weights are told apart by the modules around them. Embeddings, norms, heads,
routers, what lies outside the numbered layers of encoder and language model, and the children of
`nn.MultiheadAttention`, which reads its projection's weight without calling it, are never masked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from maskft.errors import ModelError

SCOPES = ("language", "projector", "vision")
MODULES = ("attn", "mlp", "both")
_THIRDS = ("first-third", "middle-third", "last-third")

# Parts, by the names of modules outside numbered layers.
_PROJECTORS = {"multi_modal_projector", "mm_projector", "projector", "layerwise_projectors", "spatial_projectors"}
_PROJECTORS |= {"connector", "aligner", "merger", "merger_list", "deepstack_merger_list", "vision_adapter", "mlp1"}
_PROJECTORS |= {"vision_projection", "image_to_text_projection", "language_projection", "embed_vision"}
_PROJECTORS |= {"resampler", "resampler_model", "perceiver_resampler", "img_projection_up", "img_projection_down"}
_OTHER = re.compile(r"audio|speech|talker|token2wav|qformer|vqmodel")
_VISION = re.compile(r"vision|visual|image|video|^vit$")
_LANGUAGE = {"language_model", "text_model", "llm"}

# Kinds, by the names of modules around a weight, then by its own name.
_ATTENTION_AROUND = re.compile(r"att(?:n|ention)", re.IGNORECASE)
_MLP_AROUND = re.compile(r"mlp|ffn|feed_?forward|moe|dense", re.IGNORECASE)
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "qkv", "query_key_value"}
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "linear1", "linear2", "w1", "w2", "w3"}
_MLP_BLOCKS = {"experts", "intermediate", "output"}  # the last two are BERT's
_SKIPPED = {"gate", "router", "shared_expert_gate", "indexer"}  # choose where values go, and carry none themselves

_HEADS = {"lm_head", "embed_out", "classifier", "score"}
_BARE_PROJECTIONS = {"mm_input_projection_weight"}  # Gemma-3's projector: a parameter (in, out) without a layer
_CLOSED = (nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # nothing inside is masked
_STACKED = {"qkv_proj", "qkv", "Wqkv", "c_attn", "gate_up_proj"}
_MIXED_QKV = {"CodeGenAttention", "MiniMaxLightningAttention"}  # q, k, v of one head after another


@dataclass(frozen=True)
class Weight:
    """A weight that a mask could be put on.

    Attributes:
        name: of its layer, or where no layer holds it, of the parameter.
        part: one of `SCOPES`, or "other".
        kind: "attn" or "mlp"; None for anything else.
        layer: its number in the part, counted on through the stacks of a part that has several; None outside layers.
        bare: whether `name` is a parameter's, such as the weights (experts, out, in) of a mixture of experts.
    """

    name: str
    part: str
    kind: str | None
    layer: int | None
    bare: bool


def resolve_targets(
    model: nn.Module,
    *,
    scope: Sequence[str] = ("language", "projector"),
    modules: str = "both",
    layers: str | Sequence[int] = "all",
) -> list[str]:
    """Names of the linear layers to mask, in the model's order.

    Args:
        model: any module; a model with one stack of layers and no part that is known counts as a language model.
        scope: parts of the model, any of "language", "projector", "vision".
        modules: "attn" (q, k, v, o), "mlp" (gate, up, down or fc1, fc2; experts) or "both"; does not apply to the
            projector, which is masked whole.
        layers: "all", "first-third", "middle-third", "last-third", ranges such as "0-3,8", or a list of indices;
            counted in the language model and the vision encoder each.

    Raises:
        ModelError: a scope, kind or range that is not known, or that matches nothing in this model.
    """
    return [weight.name for weight in _chosen(model, scope, modules, layers) if not weight.bare]


def resolve_parameters(
    model: nn.Module,
    *,
    scope: Sequence[str] = ("language", "projector"),
    modules: str = "both",
    layers: str | Sequence[int] = "all",
) -> list[str]:
    """Names of the parameters to mask that are no linear layer's weight; arguments and errors as `resolve_targets`.

    Transformers keeps a mixture of experts as 3-D parameters of one module, and Gemma-3's projector is one parameter.
    """
    return [weight.name for weight in _chosen(model, scope, modules, layers) if weight.bare]


def projector_names(model: nn.Module) -> list[str]:
    """Names of the outermost modules between vision encoder and language model, in the model's order."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _PROJECTORS]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return [name for name in outermost if named_part(name) == "projector"]


def layer_index(name: str) -> int | None:
    """Number of the layer within its stack, read from a name inside it; None for names outside layers."""
    _, index, inside = _split(name)
    return index if inside else None


def lies_transposed(name: str, parent: Any) -> bool:
    """Whether a weight lies as (..., in, out) where a linear layer has (..., out, in).

    Args:
        name: of the layer, or of the parameter where it is no layer's weight.
        parent: the module around it.
    """
    parent = _unwrapped(parent)
    if type(_unwrapped(getattr(parent, name, None))).__name__ == "Conv1D" or name in _BARE_PROJECTIONS:
        return True
    if len(_shape(getattr(parent, "gate_up_proj", None))) == 3:  # experts, of which Llama-4's do not tell
        return bool(_shape(parent.gate_up_proj)[-2] != 2 * _shape(parent.down_proj)[-1])
    return bool(getattr(parent, "is_transposed", False))


def fused_heights(name: str, weight: Any, parent: nn.Module) -> tuple[int, ...]:
    """Heights of the matrices that are stacked in one weight (..., out, in): q, k, v or gate, up; empty for any other.

    Weights whose q, k, v (or gate, up) take turns, head by head or row by row, are no stack of matrices: empty.

    Args:
        name: the layer's own name, or the parameter's.
        weight: its weight, as it lies.
        parent: the module around it, which knows the number of heads.
    """
    if name not in _STACKED or not hasattr(weight, "shape"):
        return ()
    parent = _unwrapped(parent)
    rows: int = getattr(_unwrapped(getattr(parent, name, None)), "out_features", 0)  # of a weight in any form
    rows = rows or _shape(weight)[-1 if lies_transposed(name, parent) else -2]
    if name == "gate_up_proj":
        return (rows // 2,) * 2 if getattr(parent, "is_concatenated", True) else ()
    if getattr(parent, "is_cross_attention", False):
        return (rows // 2,) * 2  # keys and values alone
    if type(parent).__name__ in _MIXED_QKV or getattr(parent, "multi_query", True) is False:
        return ()
    config = getattr(parent, "config", None)
    heads = getattr(parent, "num_heads", 0) or getattr(config, "num_attention_heads", 0) or 1
    groups = getattr(parent, "num_key_value_heads", 0) or getattr(config, "num_key_value_heads", 0) or heads
    groups = 1 if getattr(parent, "multi_query", False) else groups
    head, rest = divmod(rows, heads + 2 * groups)
    return () if rest else (heads * head, groups * head, groups * head)


def find_weights(model: nn.Module) -> list[Weight]:
    """Every weight that a mask could be put on, in the model's order, with its place in the model."""
    candidates = [(name, bare, *_split(name)) for name, bare in _candidates(model)]
    stacks = list(dict.fromkeys(stack for _, _, stack, _, inside in candidates if _kind(inside)))
    language = _language_stacks(model, stacks)
    parts = {stack: "language" if stack in language else named_part(stack) for stack in stacks}
    layers: dict[tuple[str, int | None], int] = {}  # number in the part, by stack and number there
    depth: Counter[str] = Counter()
    for stack, part in parts.items():
        length = len(list(model.get_submodule(stack).children()))
        length = _used_layers(model, length) if part == "vision" else length
        layers.update({(stack, i): depth[part] + i for i in range(length)})
        depth[part] += length
    return [
        Weight(name, parts.get(stack, named_part(name)), _kind(inside), layers.get((stack, index)), bare)
        for name, bare, stack, index, inside in candidates
    ]


def _chosen(model: nn.Module, scope: Sequence[str], modules: str, layers: str | Sequence[int]) -> list[Weight]:
    """The weights that scope, kind and range choose; arguments and errors are those of `resolve_targets`."""
    unknown = [part for part in scope if part not in SCOPES]
    if unknown or not scope:
        raise ModelError(f"scope is {list(scope)}; each part must be one of {', '.join(SCOPES)}, and one is needed.")
    if modules not in MODULES:
        raise ModelError(f"modules is '{modules}'; it must be one of {', '.join(MODULES)}.")

    weights = find_weights(model)
    found = [w for w in weights if w.part == "projector" or (w.layer is not None and w.kind is not None)]
    present = {weight.part for weight in found}
    alone = {"projector"} if "language" in scope and "vision" not in present else set()  # a language model by itself
    missing = [part for part in SCOPES if part in scope and part not in present | alone]
    depth = {p: max((w.layer for w in weights if w.part == p and w.layer is not None), default=-1) + 1 for p in scope}
    ranged = {"language", "vision"} & present - set(missing)
    indices = {p: _layer_indices(layers, depth[p], p) if p in ranged else set() for p in scope}
    chosen = [
        w
        for w in found
        if w.part in indices and (w.part == "projector" or (modules in (w.kind, "both") and w.layer in indices[w.part]))
    ]
    if missing or not chosen:
        raise ModelError(
            f"scope {list(scope)}, modules '{modules}', layers {layers!r} match no linear layer of "
            f"{type(model).__name__}{' in the part ' if missing else ''}{' and the part '.join(missing)}. "
            f"{_inventory(model, found)} Choose others, or name layers in target_modules instead."
        )
    return chosen


def _candidates(module: nn.Module, name: str = "") -> Iterator[tuple[str, bool]]:
    """Names of linear layers (False) and of parameters that are no linear layer's weight (True).

    Where an adapter wraps a layer, the layer goes by the name it has without.
    """
    module = _unwrapped(module)
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        yield name, False
    elif not isinstance(module, _CLOSED) and not isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
        around = f"{name}." if name else ""
        for own, parameter in module.named_parameters(recurse=False):
            if own in _BARE_PROJECTIONS or (_is_expert(own, _shape(parameter), _split(around + own)[2])):
                yield around + own, True
        for own, child in module.named_children():
            if own not in _HEADS:
                yield from _candidates(child, around + own)


def _is_expert(own: str, shape: Sequence[int], inside: Sequence[str]) -> bool:
    """Whether a bare parameter holds the weights of several experts, by its name, its shape and its path in a layer."""
    kind = _kind(inside)
    matrices = len(shape) == 3 and shape[-2] > 1 and not own.endswith("bias")
    return matrices and (kind == "mlp" or (kind == "attn" and "experts" in inside))


def _split(name: str) -> tuple[str, int | None, list[str]]:
    """A name as the stack of layers it lies in, the number of the layer, and the path inside the layer."""
    path = name.split(".")
    for i, piece in enumerate(path):
        if piece.isdigit():
            return ".".join(path[:i]), int(piece), path[i + 1 :]
    return name, None, []


def named_part(name: str) -> str:
    """Part of a module by the names around it outside layers, from the outside in; not of the language model."""
    part = "other"
    for piece in takewhile(lambda piece: not piece.isdigit(), name.split(".")):
        if _OTHER.search(piece):
            return "other"
        if piece in _PROJECTORS:
            return "projector"
        if _VISION.search(piece):
            part = "vision"
    return part


def _language_stacks(model: nn.Module, stacks: Sequence[str]) -> list[str]:
    """The stacks of layers nearest to the token embedding, of those that no name gives to another part.

    An encoder-decoder has an embedding for each, with as many rows.
    """
    stacks = [s for s in stacks if not _OTHER.search(s) and named_part(s) == "other"]
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a Transformers model, or one that cannot tell
        named = [stack for stack in stacks if _LANGUAGE & set(stack.split("."))]
        return named or (stacks if len(stacks) == 1 else [])
    rows = {m.num_embeddings for m in embedding.modules() if isinstance(m, nn.Embedding)}  # none: patches, or sound
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) and m.num_embeddings in rows]
    beside, below = set(), set()
    for path in (name.split(".") for name in tables):
        for height in range(len(path) - 1, -1, -1):
            around = "".join(f"{piece}." for piece in path[:height])
            if near := {stack for stack in stacks if stack.startswith(around)}:
                beside |= {stack for stack in near if "." not in stack.removeprefix(around)}
                below |= near
                break
    return [stack for stack in stacks if stack in (beside or below)]


def _kind(inside: Sequence[str]) -> str | None:
    """Kind of a weight by its path inside a layer."""
    if not inside or _SKIPPED & set(inside):
        return None
    *around, own = inside
    for piece in reversed(around):
        if _ATTENTION_AROUND.search(piece):
            return "attn"
        if _MLP_AROUND.search(piece):
            return "mlp"
    if own in _ATTENTION:
        return "attn"
    return "mlp" if own in _MLP or _MLP_BLOCKS & set(around) else None


def _used_layers(model: nn.Module, depth: int) -> int:
    """Layers of a vision encoder up to the last one whose output the language model sees; no mask learns above it."""
    used = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    outputs = [used] if isinstance(used, int) else list(used or [])  # of depth + 1: the first is what goes in
    return max((output % (depth + 1) for output in outputs), default=depth)


def _inventory(model: nn.Module, found: Sequence[Weight]) -> str:
    """One sentence on what there is, by part and by place, the first two pieces of a name."""
    parts = ", ".join(f"{part} ({sum(weight.part == part for weight in found)})" for part in SCOPES)
    places = Counter(".".join(_split(name)[0].split(".")[:2]) for name, _ in _candidates(model))
    listed = ", ".join(f"{place} ({count})" for place, count in places.items()) or "none"
    return f"Its linear layers by part: {parts}; by place: {listed}."


def _unwrapped(module: Any) -> Any:
    """The module under the adapters that wrap it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _shape(parameter: Any) -> Sequence[int]:
    """The parameter's shape, also where DeepSpeed keeps it in pieces."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", getattr(parameter, "shape", ()))
    return shape


def _layer_indices(layers: str | Sequence[int], depth: int, part: str) -> set[int]:
    """The chosen indices among the `depth` layers of `part`."""
    if layers == "all":
        return set(range(depth))
    if isinstance(layers, str) and layers in _THIRDS:
        third = _THIRDS.index(layers)
        return set(range(round(depth * third / 3), round(depth * (third + 1) / 3)))
    if isinstance(layers, str):
        matches = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece) for piece in layers.replace(" ", "").split(",")]
        spans = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match]
        if len(spans) < len(matches) or not all(spans):
            raise ModelError(
                f"layers is '{layers}'; it must be 'all', 'first-third', 'middle-third', 'last-third', ranges such "
                "as '0-3,8', or a list of indices."
            )
        layers = [i for span in spans for i in span[: depth + 5]]  # enough to name what is outside
    outside = sorted(i for i in set(layers) if not 0 <= i < depth)
    if outside:
        raise ModelError(f"layers names {outside[:5]}, but the {part} part has layers 0 to {depth - 1}.")
    return set(layers)
