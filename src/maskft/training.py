"""A recipe becomes a run: TRL's SFTTrainer over the masked model, resumed where it was interrupted."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import set_seed
from trl import SFTConfig

from maskft.audit import MaskAudit
from maskft.checkpoints import clear_away, newest_sound
from maskft.data import Collator, check
from maskft.errors import RecipeError, RunError, did_you_mean
from maskft.guard import CHECKPOINTS, LOCK, Guard
from maskft.learnt import save_result
from maskft.memory import keep_freed_memory, return_freed_memory
from maskft.methods import FullMethod, MaskMethod, Method, ProjectorMethod, is_fixed
from maskft.presence import NOTHING, Absent
from maskft.recipe import Recipe, method_settings
from maskft.runs import (
    RECIPE,
    environment,
    load_data,
    read_metrics,
    run_recipe,
    update_metrics,
    write_atomically,
    write_json,
)
from maskft.sharded import load_base
from maskft.trainer import make_trainer
from maskft.tuner import attach
from maskft.tuner.sharding import full_shape, is_first_process
from maskft.vlm.load import load_processor, load_skeleton
from maskft.whole import find_projector, find_projector_names, train_whole, whole_parameters

LOG = "log.json"
Say = Callable[[str], None]

_DEFAULTS: dict[str, Any] = {
    "report_to": "none",  # trackers only when asked for
    "gradient_checkpointing": False,
    "disable_tqdm": True,  # a bar of our own, on stderr
    "logging_steps": 10,
    "save_total_limit": 2,
    "weight_decay": 0.0,
    "max_length": 2048,
}
_USUAL: dict[str, Any] = {"adam_epsilon": 1e-8, "max_grad_norm": 1.0}
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    # score gradients carry a factor |W| m0 (1 - m0), about 4e-4, and Adam's usual eps of 1e-8 would damp them
    # as tiny as that, they are not clipped, which would cost a pass over them
    "mask": {"adam_epsilon": 1e-12, "max_grad_norm": 0.0},
    "lora": {"learning_rate": 2e-4, **_USUAL},
    "unilora": {"learning_rate": 2e-3, **_USUAL},
    "hira": {"learning_rate": 2e-3, **_USUAL},  # factors change a weight by a share of itself
    "full": {"learning_rate": 2e-5, **_USUAL},
    "projector": {"learning_rate": 1e-3, **_USUAL},
}
_OURS = {
    "output_dir": "use --output",
    "push_to_hub": "push the exported folder yourself",
    "resume_from_checkpoint": "a repeated call on the same --output resumes",
    "dataset_kwargs": "the data is prepared already",
    "remove_unused_columns": "the collator needs every column",
}


def training_arguments(recipe: Recipe, output: Path) -> Any:
    """TRL's SFTConfig from the recipe's `training` section.

    Raises:
        RecipeError: an unknown field (the nearest valid one is named) or a value SFTConfig refuses.
    """
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for key in recipe.training:
        if key in _OURS:
            raise RecipeError(f"training.{key} cannot be set: {_OURS[key]}.")
        if key not in fields:
            raise RecipeError(
                f"unknown key 'training.{key}'.{did_you_mean(key, fields)} Allowed are the fields of TRL's SFTConfig."
            )
    masked = isinstance(recipe.method, MaskMethod)
    # FSDP's own bf16 would round the scores as well, and a base in bf16 computes in it anyway
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and recipe.method.name == "unilora":
        raise RecipeError(
            "method.name is 'unilora', whose one vector lies in all layers, so that FSDP cannot split it. Train it "
            "with copies of the model (recipes/distributed/ddp.yaml)."
        )
    computed = {
        "bf16": recipe.model.dtype == "bfloat16" and not (masked and sharded),
        "fp16": recipe.model.dtype == "float16",
        "use_cpu": not torch.accelerator.is_available(),
    }
    values = {
        **_DEFAULTS,
        **_METHOD_DEFAULTS[recipe.method.name],
        **method_settings(recipe),
        **computed,
        **recipe.training,
    }
    try:
        return SFTConfig(
            output_dir=str(output / CHECKPOINTS),
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **values,
        )
    except Exception as error:  # SFTConfig raises many kinds on values of the wrong type
        raise RecipeError(f"training: {error}") from error


def train(
    recipe: Recipe, output: Path, *, say: Say = lambda text: None, parts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Train into the folder `output`, resuming an interrupted run of the same recipe there.

    Nothing is written before recipe, data, model and targets have been checked. Where several processes were launched,
    each of them calls this, and the first one speaks and writes.

    Args:
        recipe: what to do.
        output: the run's folder.
        say: for remarks.
        parts: the recipe's data sets, where they are loaded already.

    Returns:
        The content of metrics.json, with `train` filled in.

    Raises:
        RecipeError, DataError, ModelError: what the user gave cannot be used.
        RunError: `output` holds a run of another recipe, is in use or cannot be written, or the loss is no number.
        Paused: SIGTERM asked for an end; a checkpoint has been saved.
    """
    with Guard(output, say) as guard:
        return _train(recipe, output, say, guard, parts)


def _train(recipe: Recipe, output: Path, say: Say, guard: Guard, parts: Mapping[str, Any] | None) -> dict[str, Any]:
    first = is_first_process()
    say = say if first else lambda text: None
    if _finished(recipe, output):
        say(f"{output} already holds a finished run of this recipe.")
        return read_metrics(output)
    ready = prepare(recipe, output, say, parts=parts)
    say(f"training {ready.trainable:,} parameters beside a base of {ready.base_parameters:,}")

    ready.arguments.distributed_state.wait_for_everyone()  # until every process has looked at the folder
    if first:
        guard.claim()
        _finished(recipe, output)  # another process may have written there meanwhile
        write_atomically(output / RECIPE, recipe.to_yaml())
        write_json(output / "environment.json", environment())
    if is_fixed(recipe.method):
        save_result(recipe.method, ready.model, output, dtype=getattr(torch, recipe.model.dtype), say=say)
        return update_metrics(output, {"train": _untrained(ready)}) if first else {"train": _untrained(ready)}
    if ready.shares is None:
        keep_freed_memory()
    else:
        return_freed_memory()
    trainer = make_trainer(
        ready.model,
        ready.arguments,
        collator=Collator(ready.processor, ready.arguments.max_length),
        processor=ready.processor,
        parts=ready.parts,
        log=output / LOG,
        audit=MaskAudit(strict=recipe.audit.strict),
        memory=recipe.method.memory if isinstance(recipe.method, MaskMethod) else None,
        projector_rate=getattr(recipe.method, "projector_learning_rate", None),
        shares=ready.shares,
    )
    guard.watch(trainer)
    checkpoint, passed_over = newest_sound(output / CHECKPOINTS)
    ready.arguments.distributed_state.wait_for_everyone()  # until every process has chosen
    for path, flaw in passed_over.items():
        say(f"passing over {path}: {flaw}")
    if first:
        clear_away(passed_over)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    started = time.monotonic()
    state = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - started
    guard.finish(trainer)

    save_result(recipe.method, trainer.model, output, dtype=getattr(torch, recipe.model.dtype), say=say)
    trained = {
        **_untrained(ready),
        "seconds": round(seconds, 1),
        "steps": state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "loss": round(state.training_loss, 4),
        "resumed_from_step": _step(checkpoint),
        "best_step": _step(trainer.state.best_model_checkpoint),
    }
    return update_metrics(output, {"train": trained}) if first else {"train": trained}


def _untrained(ready: Ready) -> dict[str, Any]:
    """The record of a run that made no step."""
    return {
        "seconds": 0.0,
        "steps": 0,
        "epochs": 0.0,
        "examples": len(ready.parts["train"]),
        "loss": None,
        "trainable_parameters": ready.trainable,
        "base_parameters": ready.base_parameters,
        "resumed_from_step": None,
        "best_step": None,
    }


@dataclasses.dataclass(frozen=True)
class Ready:
    """What a recipe asks for, loaded and checked."""

    arguments: Any
    parts: Mapping[str, Any]
    processor: Any
    model: Any
    shares: Any
    longest: int
    base_parameters: int
    trainable: int


def prepare(
    recipe: Recipe, output: Path, say: Say, lacking: Absent = NOTHING, parts: Mapping[str, Any] | None = None
) -> Ready:
    """Load and check everything but what is lacking, cheapest first, writing nothing; `parts` as `train`."""
    arguments = training_arguments(recipe, output)
    section = recipe.model
    if parts is None:
        parts = {} if lacking.data else load_data(recipe)
    if not lacking.data:
        _require_validation(arguments, parts)
    trusted = section.trust_remote_code
    processor = None if lacking.processor else load_processor(section.base, trust_remote_code=trusted)
    longest = 0
    for name, part in parts.items():
        summary = check(part, processor=processor, max_length=arguments.max_length, progress=_bar(f"checking {name}"))
        say(f"{name} data: {summary.examples} examples, longest {summary.longest} tokens")
        longest = max(longest, summary.longest or 0)
    if lacking.weights:
        model, shares = load_skeleton(section.base, dtype=section.dtype, trust_remote_code=trusted), None
    else:
        model, shares = load_base(section, recipe.method, say)
    unseen = sum(full_shape(p).numel() - p.numel() for p in model.parameters())  # in other processes
    base_parameters = model.num_parameters() + unseen  # also of a quantised model, whose tensors are packed
    set_seed(arguments.seed)  # hard masks may start random
    model = _made_trainable(model, recipe.method)
    trainable = sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad)
    return Ready(arguments, parts, processor, model, shares, longest, base_parameters, trainable)


def _require_validation(arguments: Any, parts: Mapping[str, Any]) -> None:
    """Raise RecipeError where a checkpoint is to be chosen on what isn't there."""
    if arguments.eval_strategy != "no" and "validation" not in parts:
        raise RecipeError(
            f"training.eval_strategy is '{arguments.eval_strategy.value}', but there is no validation part. Set "
            "data.validation or data.split.validation."
        )
    if arguments.load_best_model_at_end and arguments.metric_for_best_model not in ("loss", "eval_loss"):
        raise RecipeError(
            f"training.metric_for_best_model is '{arguments.metric_for_best_model}'; only eval_loss is measured while "
            "training."
        )


def _finished(recipe: Recipe, output: Path) -> bool:
    """Whether `output` holds a finished run of this recipe.

    Raises:
        RunError: it holds a run of another recipe, or something that isn't a run.
    """
    if not output.exists() or (output.is_dir() and not any(path.name != LOCK for path in output.iterdir())):
        return False
    if not output.is_dir() or not (output / RECIPE).is_file():
        raise RunError(f"{output} exists and is not a run folder. Give --output a new folder.")
    earlier, now = _flat(run_recipe(output).model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if changed:
        lines = "\n".join(f"  - {key}: {earlier.get(key)!r} there, {now.get(key)!r} now" for key in changed[:10])
        raise RunError(f"{output} holds a run of another recipe:\n{lines}\nGive --output another folder, or remove it.")
    return "train" in read_metrics(output)


def _step(checkpoint: Path | str | None) -> int | None:
    """The step in a checkpoint's name."""
    return int(str(checkpoint).rsplit("-", 1)[1]) if checkpoint else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        quiet = not is_first_process()
        bar: Iterable[Any] = tqdm(items, desc=label, file=sys.stderr, leave=False, mininterval=0.5, disable=quiet)
        return bar

    return wrap


def _made_trainable(model: Any, method: Method) -> Any:
    """The model as the method trains it: with an adapter, or with some of its own weights in fp32."""
    if isinstance(method, FullMethod):
        train_whole(model, whole_parameters(model, **method.model_dump(exclude={"name"})))
        return model
    if isinstance(method, ProjectorMethod):
        find_projector(model).float().requires_grad_(True)
        return model
    whole = find_projector_names(model) if method.train_projector else []
    adapted = attach(model, method.config() if isinstance(method, MaskMethod) else method.peer(), whole=whole)
    return adapted.requires_grad_(False) if is_fixed(method) else adapted
