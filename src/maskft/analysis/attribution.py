"""Analyses of runs by name, each from run folders to JSON: what studies and `maskft analyse` call.

    agreement   do seeds, tasks and settings change the same weights?
    bound       how far can the error lie above the training error, by the bits of the adapter?
    captions    is a drawn shape still described as before?
    drift       how fast, and for how long, does the mask move?
    forgetting  how much worse is the language model at other text?
    gap         held-out against training loss, where runs have the same training loss
    probes      which attribute can be read from which layer, before and after?

A new one is a function and its name in OF_ONE or ANALYSES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from maskft.adapters import distance
from maskft.analysis.bound import examples_needed, image_errors, learnt_bits, occam_bound
from maskft.analysis.captions import captions
from maskft.analysis.compare import checkpoints, drift, overlap, relation
from maskft.analysis.forgetting import forgetting
from maskft.analysis.gap import gaps
from maskft.analysis.masks import SAMPLE, saved_masks, statistics
from maskft.analysis.probes import probes
from maskft.errors import RunError
from maskft.evaluation.compare import read_records
from maskft.evaluation.evaluate import scored
from maskft.evaluation.metrics import blind_guesses
from maskft.learnt import ADAPTER, result_name
from maskft.measures import place
from maskft.methods import MaskMethod
from maskft.runs import RECIPE, run_recipe
from maskft.tuner.settings import CONFIG

Analysis = Callable[[Sequence[Path]], dict[str, Any]]


def _each(analyse: Callable[[Path], dict[str, Any]]) -> Analysis:
    return lambda runs: {"runs": [analyse(run) for run in runs]}


def bound(run: Path, *, delta: float = 0.05) -> dict[str, Any]:
    """Occam's bound for what a run learnt, as it is saved; examples are images, each with the mean of its questions.

    Returns:
        {"run", "bits", "settings_bits", "questions", "images", "training_error", "test_error" where it is known,
        "blind_error", "delta", "rate", "hoeffding", "kl", "says_something", "images_needed"}. A bound says something
        where it is below the error of guessing without the image; "images_needed" is how many it would take to be so,
        with the same bits and training error (None where no number is enough).

    Raises:
        RunError: the training questions have not been answered.
        AdapterError: there is no adapter.
    """
    recipe = run_recipe(run)
    metric, learnt = recipe.evaluation.metric, result_name(recipe.method)
    records = read_records(run, "train")
    errors = image_errors(records, scored(metric, [r["tuned"] for r in records], records))
    bits = learnt_bits(run, learnt, CONFIG if learnt == ADAPTER else RECIPE)
    training = sum(errors) / len(errors)
    found = occam_bound(bits["total"], len(errors), training, delta)
    blind = _blind_error(metric, records)
    told: dict[str, Any] = {
        "run": str(run),
        "bits": bits["total"],
        "settings_bits": bits["settings"],
        "questions": len(records),
        "images": len(errors),
        "training_error": training,
        "blind_error": blind,
        "delta": delta,
        "rate": found.rate,
        "hoeffding": found.hoeffding,
        "kl": found.kl,
        "says_something": found.kl < blind,
        "images_needed": examples_needed(bits["total"], training, blind, delta) if training < blind < 1 else None,
    }
    if (run / "answers-test.jsonl").is_file():
        held_out = read_records(run, "test")
        unseen = image_errors(held_out, scored(metric, [r["tuned"] for r in held_out], held_out))
        told["test_error"] = sum(unseen) / len(unseen)
    return told


def _blind_error(metric: str, records: Sequence[dict[str, Any]]) -> float:
    """Error of the most frequent answer to each question, image by image; what looking is worth is below it."""
    questions, truths = [r["question"] for r in records], [r["truth"] for r in records]
    errors = image_errors(records, scored(metric, blind_guesses(questions, truths, questions), records))
    return sum(errors) / len(errors)


def mask_drift(run: Path) -> dict[str, Any]:
    """Drift of a run's mask by checkpoint.

    Returns:
        {"run", "checkpoints": [{"step", "from_start", "to_last", "correlation", "since_last_one"}],
        "first_with_last"}: the correlation of the first checkpoint's scores with the last one's, and the mean
        |m - m'| to the checkpoint before.

    Raises:
        RunError: the run has fewer than two checkpoints.
    """
    folders = checkpoints(run)
    if len(folders) < 2:
        raise RunError(
            f"{run} has {len(folders)} checkpoint(s), but drift needs two or more. Set training.save_steps, and "
            "training.save_total_limit to none, before training."
        )
    steps = drift(folders)
    paths = list(folders.values())
    moved = [distance(a, b).overall.mean_difference for a, b in pairwise(paths)]
    told = [{**asdict(step), "since_last_one": far} for step, far in zip(steps, [None, *moved], strict=True)]
    return {"run": str(run), "checkpoints": told, "first_with_last": steps[0].correlation}


def agreement(runs: Sequence[Path]) -> dict[str, Any]:
    """Whether runs on one base change the same weights, pair by pair.

    Returns:
        {"shared", "by_chance", "pairs": [{"a", "b", "relation", "shared", "by_chance", "deviations", "correlation",
        "by_layer"}], "runs": [{"run", "distance_by_layer"}]}; the first two are means over the pairs, of "shared" over
        those that have it. "deviations" is how many standard deviations "shared" lies above chance; by layer means the
        mean over a layer's matrices of the language model.

    Raises:
        RunError: fewer than two runs, or one that has no mask.
        AdapterError: they are of different bases.
    """
    if len(runs) < 2:
        raise RunError("agreement compares runs, so give two or more.")
    for run in runs:
        if not isinstance(run_recipe(run).method, MaskMethod):
            raise RunError(f"{run} has no mask: its method is '{run_recipe(run).method.name}'. Leave it out.")
    masks = {run: list(saved_masks(run, sample=SAMPLE)) for run in runs}
    pairs: list[dict[str, Any]] = []
    for a, b in combinations(runs, 2):
        found = overlap(masks[a], masks[b])
        above = None if found.shared is None else found.shared - found.by_chance
        pairs.append(
            {
                "a": str(a),
                "b": str(b),
                "relation": relation(run_recipe(a), run_recipe(b)),
                "shared": found.shared,
                "by_chance": found.by_chance,
                "deviations": None if above is None or not found.deviation else above / found.deviation,
                "correlation": distance(a, b).overall.correlation,
                "by_layer": _by_layer(found.layers),
            }
        )
    moved = {run: {mask.name: statistics(mask).distance for mask in masks[run]} for run in runs}
    shared = [pair["shared"] for pair in pairs if pair["shared"] is not None]
    return {
        "shared": math.fsum(shared) / len(shared) if shared else None,
        "by_chance": math.fsum(pair["by_chance"] for pair in pairs) / len(pairs),
        "pairs": pairs,
        "runs": [{"run": str(run), "distance_by_layer": _by_layer(of)} for run, of in moved.items()],
    }


def _by_layer(values: dict[str, float | None]) -> list[float | None]:
    """Means over the matrices of each layer of the language model, first layer first."""
    layers: dict[int, list[float]] = {}
    for name, value in values.items():
        where = place(name)
        if where.part == "language" and where.layer >= 0 and value is not None:
            layers.setdefault(where.layer, []).append(value)
    found = {layer: sum(of) / len(of) for layer, of in layers.items()}
    return [found.get(layer) for layer in range(max(found, default=-1) + 1)]


OF_ONE: dict[str, Callable[..., dict[str, Any]]] = {
    "bound": bound,
    "captions": captions,
    "drift": mask_drift,
    "forgetting": forgetting,
    "probes": probes,
}
"""Analyses of each run by itself; what they take by keyword are numbers."""
ANALYSES: dict[str, Analysis] = {
    "agreement": agreement,
    "gap": gaps,
    **{name: _each(analyse) for name, analyse in OF_ONE.items()},
}
"""All analyses, of several runs."""
