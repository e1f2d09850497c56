"""What a recipe and its alternatives need, what of that fits, and which setting to change first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maskft.errors import RecipeError
from maskft.memory import MODES
from maskft.methods import FullMethod, MaskMethod, PeerMethod, is_fixed, trains_projector
from maskft.plan.predict import Peak, Predictor
from maskft.plan.skeleton import Skeleton
from maskft.plan.step import Load
from maskft.plan.ways import PLAIN, SAME, Way, with_mode
from maskft.recipe import Recipe
from maskft.training import training_arguments
from maskft.tuner import MaskConfig, Peer
from maskft.vlm.load import load_skeleton
from maskft.whole import find_projector_names, whole_parameters

RANK = 16
"""Of LoRA and QLoRA, to compare with."""
WORTH = 0.01
"""Changes that save less than this share of the peak are not proposed."""


@dataclass(frozen=True)
class Row:
    """One way to train and its peak.

    Attributes:
        name: of the way.
        peak: by part.
        fits: whether it is within the memory asked about; None where none was given.
    """

    name: str
    peak: Peak
    fits: bool | None


@dataclass(frozen=True)
class Change:
    """Settings that make the recipe's peak lower.

    Attributes:
        settings: as overrides of the recipe.
        total: the peak with them, in bytes.
        fits: as in `Row`.
    """

    settings: tuple[str, ...]
    total: int
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        base: the recipe's.
        parameters: of the base.
        load: what one step works on.
        ranks: processes that share base and training state.
        budget: bytes of memory asked about.
        rows: the recipe first, then other ways to train the same layers.
        changes: of single settings, the one that saves most first; empty where the recipe fits.
        enough: a set of them that makes the recipe fit; None where none does, or nothing was asked.
        remarks: on what was left out.
    """

    base: str
    parameters: int
    load: Load
    ranks: int
    budget: int | None
    rows: list[Row]
    changes: list[Change]
    enough: Change | None
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        autocast = str(self.load.autocast).removeprefix("torch.") if self.load.autocast else None
        return {
            "base": self.base,
            "parameters": self.parameters,
            "step": {**asdict(self.load), "autocast": autocast},
            "ranks": self.ranks,
            "budget": self.budget,
            "methods": [{"name": row.name, "fits": row.fits, **row.peak.as_dict()} for row in self.rows],
            "changes": [asdict(change) for change in self.changes],
            "enough": asdict(self.enough) if self.enough else None,
            "remarks": self.remarks,
        }


def plan(
    recipe: Recipe,
    *,
    budget: int | None = None,
    ranks: int = 1,
    tokens: int | None = None,
    images: int | None = None,
    device: str | None = None,
    alone: bool = False,
) -> Plan:
    """Predict the peak memory of one training step, for the recipe and for other ways to train the same layers.

    Args:
        recipe: its data is not looked at.
        budget: bytes of memory of one process.
        ranks: processes that share base and training state (FSDP2, ZeRO-3).
        tokens: of a row, image tokens included; default: `training.max_length`, or what the model can take.
        images: of a row; default: one, where the model sees.
        device: "gpu" or "cpu"; default: "cpu" where the recipe says `training.use_cpu`, else "gpu".
        alone: leave out other ways and changes, which take most of the time.

    Raises:
        RecipeError: a setting that cannot be used, or rows too short for their images.
        ModelError: no such base, its config cannot be made into a model, or the model does not run without values.
    """
    if ranks < 1:
        raise RecipeError(f"--ranks is {ranks}; it must be 1 or more.")
    section = recipe.model
    arguments = training_arguments(recipe, Path("plan"))
    eager = section.attention if section.attention == "eager" else None  # others keep as much as the default
    model = load_skeleton(
        section.base, dtype=section.dtype, attention=eager, trust_remote_code=section.trust_remote_code
    )
    load = _load(recipe, arguments, model, tokens, images, device)
    skeleton = Skeleton(model)
    predictor = Predictor(skeleton)
    own = replace(_own(recipe, skeleton), clipped=arguments.max_grad_norm > 0)
    if ranks > 1 and own.quantization != "none":
        raise RecipeError(
            f"model.quantization is '{own.quantization}' and --ranks {ranks}: a quantised base in pieces is not "
            "supported. Plan one of the two."
        )

    def fits(total: int) -> bool | None:
        return None if budget is None else total <= budget

    rows = []
    for way in (own, *(() if alone else _peers(recipe, own, skeleton))):
        if ranks == 1 or way.quantization == "none":
            peak = predictor.predict(way, load, ranks=ranks)
            rows.append(Row(way.name, peak, fits(peak.total)))
    changes: list[Change] = []
    enough = None
    if not rows[0].fits and not alone:
        options = list(_options(own, load, ranks))
        changes, enough = _first(predictor, own, load, ranks, options, rows[0].peak.total, budget)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    remarks = list(_remarks(rows[0].peak, load, budget, ranks))
    return Plan(section.base, parameters, load, ranks, budget, rows, changes, enough, remarks)


def _load(
    recipe: Recipe, arguments: Any, model: Any, tokens: int | None, images: int | None, device: str | None
) -> Load:
    """What one forward pass works on."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if tokens is None:
        lengths = [length for length in (arguments.max_length, longest) if length]
        if not lengths:
            raise RecipeError("training.max_length is null, so that no length is known. Give --tokens.")
        tokens = min(lengths)
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    sees = getattr(model.config, "vision_config", None) is not None
    return Load(
        batch=arguments.per_device_train_batch_size,
        tokens=tokens,
        images=(1 if sees else 0) if images is None else images,
        accumulation=arguments.gradient_accumulation_steps,
        checkpointing=bool(arguments.gradient_checkpointing),
        autocast=autocast,
        device=device or ("cpu" if recipe.training.get("use_cpu") else "gpu"),
    )


def _own(recipe: Recipe, skeleton: Skeleton) -> Way:
    """The recipe's way."""
    method, quantization = recipe.method, recipe.model.quantization
    if is_fixed(method):
        raise RecipeError("method.fixed makes no training step, so there is nothing to plan.")
    whole = tuple(find_projector_names(skeleton.model)) if trains_projector(method) else ()
    beside: dict[str, Any] = {"quantization": quantization, "whole": whole}
    if isinstance(method, MaskMethod):
        memory = method.memory
        name = "H-MFT" if method.gate in ("topk", "threshold") else "S-MFT"
        config = skeleton.targets(method.config())
        return Way(f"recipe: {name} {memory}", "mask", MODES[memory], config, **beside)
    if isinstance(method, PeerMethod):
        peer = method.peer()
        if peer.variant == "dora" and quantization != "none":
            raise RecipeError(
                "DoRA measures its weights anew in every step, which is not planned for a quantised base. Plan it with "
                "model.quantization=none."
            )
        where = method.model_dump(include={"scope", "modules", "layers", "target_modules"})
        config = skeleton.targets(MaskConfig(**where))
        return Way(f"recipe: {_peer_name(peer, quantization)}", "lora", PLAIN, config, peer=peer, **beside)
    if isinstance(method, FullMethod):
        trained = tuple(whole_parameters(skeleton.model, **method.model_dump(exclude={"name"})))
        return Way("recipe: full", "full", PLAIN, MaskConfig(target_modules=list(trained)), trained=trained)
    names = find_projector_names(skeleton.model)
    return Way("recipe: projector", "projector", PLAIN, MaskConfig(target_modules=names))


def _peer_name(peer: Peer, quantization: str) -> str:
    names = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA", "unilora": "Uni-LoRA", "hira": "HiRA"}
    name = names[peer.variant if peer.kind == "lora" else peer.kind]
    length = f", {peer.vector_length:,} numbers" if peer.kind == "unilora" else ""
    few_bits = quantization != "none"
    return f"{'Q' if few_bits else ''}{name} r{peer.rank}{length}{f', {quantization}' if few_bits else ''}"


def _peers(recipe: Recipe, own: Way, skeleton: Skeleton) -> Iterator[Way]:
    """Other ways to train the same layers; beside stage 1 those that are masked by default."""
    quantization = recipe.model.quantization
    chosen = own.config if own.kind in ("mask", "lora") else skeleton.targets(MaskConfig())
    dense = replace(chosen, gate="soft", score_layout="dense", storage="float32", ranking="matrix")
    for memory, mode in MODES.items():
        yield replace(with_mode(f"S-MFT {memory}", dense, mode, quantization), clipped=own.clipped)
    hard = with_mode("H-MFT fast", replace(dense, gate="topk"), MODES["fast"], quantization)
    yield replace(hard, clipped=own.clipped)
    yield Way(f"LoRA r{RANK}", "lora", PLAIN, dense, RANK, quantization)
    yield Way(f"QLoRA r{RANK}, nf4", "lora", PLAIN, dense, RANK, "nf4")
    yield Way("full, bf16 with bf16 moments", "full", SAME, dense, dtype=torch.bfloat16)
    yield Way("full, fp32", "full", PLAIN, dense, dtype=torch.float32)


def _options(own: Way, load: Load, ranks: int) -> Iterator[tuple[str, Any]]:
    """Single changes: the overrides, and a function from (way, load) to the changed ones."""
    if own.kind == "mask":
        for memory in ("balanced", "tight"):
            if own.mode != MODES[memory]:
                yield f"method.memory={memory}", _mode(memory)
        if own.config.score_layout == "dense":
            yield "method.score_layout=low-rank", _layout
    quantizable = own.kind == "mask" or (
        own.peer is not None and own.peer.kind == "lora" and own.peer.variant != "dora"
    )
    if quantizable and own.quantization == "none" and ranks == 1:
        yield "model.quantization=nf4", _few_bits
    if not load.checkpointing:
        yield "training.gradient_checkpointing=true", _checkpointing
    if load.batch > 1:
        steps = load.batch * load.accumulation
        yield f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={steps}", _one_row


def _mode(memory: str) -> Any:
    def change(way: Way, load: Load) -> tuple[Way, Load]:
        config = replace(way.config, score_dtype=MODES[memory].score_dtype)
        return replace(way, mode=MODES[memory], config=config), load

    return change


def _layout(way: Way, load: Load) -> tuple[Way, Load]:
    return replace(way, config=replace(way.config, score_layout="low-rank", storage="float32")), load


def _few_bits(way: Way, load: Load) -> tuple[Way, Load]:
    return replace(way, quantization="nf4"), load


def _checkpointing(way: Way, load: Load) -> tuple[Way, Load]:
    return way, replace(load, checkpointing=True)


def _one_row(way: Way, load: Load) -> tuple[Way, Load]:
    return way, replace(load, batch=1, accumulation=load.batch * load.accumulation)


def _first(
    predictor: Predictor,
    own: Way,
    load: Load,
    ranks: int,
    options: list[tuple[str, Any]],
    before: int,
    budget: int | None,
) -> tuple[list[Change], Change | None]:
    """Changes of one setting each, best first, and the fewest of them, taken best first, that are enough."""

    def total(way: Way, load: Load) -> int:
        return predictor.predict(way, load, ranks=ranks).total

    singles = [(total(*change(own, load)), name, change) for name, change in options]
    worth = sorted((one for one in singles if one[0] < before * (1 - WORTH)), key=lambda one: one[:2])
    changes = [Change(tuple(name.split()), size, None if budget is None else size <= budget) for size, name, _ in worth]
    if budget is None:
        return changes, None
    taken: list[str] = []
    now, way, size = load, own, before
    left = {name: change for _, name, change in worth}
    while size > budget and left:
        tried = {name: total(*change(way, now)) for name, change in left.items()}
        best = min(tried, key=lambda name: (tried[name], name))
        if tried[best] >= size:
            break
        size = tried[best]
        way, now = left.pop(best)(way, now)
        key = best.partition("=")[0]
        left = {name: change for name, change in left.items() if name.partition("=")[0] != key}
        taken += best.split()
    return changes, Change(tuple(taken), size, True) if size <= budget else None


def _remarks(peak: Peak, load: Load, budget: int | None, ranks: int) -> Iterator[str]:
    if load.images and not peak.seen:
        yield "the vision encoder was not run: its image tokens count as tokens, what it needs itself is left out"
    if load.device == "gpu":
        yield "tensors alone are counted: CUDA and its libraries take memory beside them, and so do gaps between them"
    if ranks > 1:
        yield "gathered: two layers of the language model, one used and one on its way, and all that is outside layers"
