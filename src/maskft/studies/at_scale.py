"""A study at the size of a paper: memory and hours of its runs, known from the base's config alone.

    python -m maskft.studies.at_scale studies/gate.yaml ...

plans the section `paper` of each study and writes `studies/<study>/plan.json`, from which the study's page is made.
Nothing of it is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from maskft.errors import StudyError
from maskft.methods import FullMethod, HiraMethod, MaskMethod, Method, ProjectorMethod, is_fixed
from maskft.recipe import Recipe, load_recipe
from maskft.runs import write_json
from maskft.studies.definition import Cell, Study, as_overrides, cells, load_study, tuned_groups, tuning_cell
from maskft.studies.sections import Paper, Settings

IMAGE_TOKENS = 729
"""Of an image in SigLIP-so400m-patch14-384."""
TEXT_TOKENS = 295
"""Of text in a row, assumed: with an image's, 1,024."""
PEAK, SHARE = 312e12, 0.3
"""FLOP/s of an A100 in bf16, and how much of that training reaches, assumed."""
PLAN = "plan.json"
_STEP = "relative_step"
_STEPS, _DATA = "training.max_steps", "data.share"


def gpu_hours(rows: float, *, language: int, vision: int, gradients: int) -> float:
    """GPU hours of so many rows with an image each: floating-point operations over what a GPU is assumed to reach.

    For each token and weight of the language model 2 operations forward, 2 as the checkpointed layers are computed
    again, 2 for the gradient of the input; 2 more for each weight whose gradient is computed. For each token of an
    image and weight of the vision encoder 2. Attention's own products are left out.

    Args:
        rows: that are trained on.
        language, vision: weights of these parts.
        gradients: weights whose gradient is computed.
    """
    tokens = (IMAGE_TOKENS + TEXT_TOKENS) * (6 * language + 2 * gradients)
    return rows * (tokens + IMAGE_TOKENS * 2 * vision) / (PEAK * SHARE) / 3600


def demand(recipe: Recipe) -> dict[str, int]:
    """What a run takes on GPUs, its data, processor and weights left aside.

    Returns:
        {"bytes" on one GPU, "bytes_of_copies" on each of several, "base_parameters", "trainable_parameters",
        "language_weights", "vision_weights", "gradients": weights whose gradient is computed}.

    Raises:
        ModelError, RecipeError: as `maskft.plan.plan`.
    """
    from maskft.plan import plan
    from maskft.presence import Absent
    from maskft.targets import find_weights
    from maskft.training import prepare
    from maskft.vlm.load import load_skeleton

    section, method = recipe.model, recipe.method
    ready = prepare(recipe, Path("plan"), lambda text: None, Absent(("left aside",), processor=True, weights=True))
    adapted = set(getattr(ready.model, "targeted_module_names", []))
    model = load_skeleton(section.base, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    weights = {"language": model.get_output_embeddings().weight.numel(), "vision": 0, "projector": 0}
    inside = 0
    for weight in find_weights(model):
        count = model.get_submodule(weight.name).weight.numel()
        weights[weight.part] += count
        inside += count if weight.name in adapted else 0
    if isinstance(method, MaskMethod) and method.ranking == "global":  # chosen by values; of the same size as by matrix
        recipe = recipe.model_copy(update={"method": method.model_copy(update={"ranking": "matrix"})})
    one = plan(recipe, alone=True).rows[0].peak.total
    kept = 6 if isinstance(method, MaskMethod) else 4  # gradients in fp32 and not of weights in bf16, and buckets
    return {
        "bytes": one,
        "bytes_of_copies": one + kept * ready.trainable,
        "base_parameters": ready.base_parameters,
        "trainable_parameters": ready.trainable,
        "language_weights": weights["language"],
        "vision_weights": weights["vision"],
        "gradients": _gradients(method, inside, ready.trainable),
    }


def _gradients(method: Method, adapted: int, trainable: int) -> int:
    """Weights whose own gradient is computed; LoRA's factors have no need of it."""
    if isinstance(method, FullMethod | ProjectorMethod):
        return trainable
    return adapted if isinstance(method, MaskMethod | HiraMethod) else 0


def plan_study(study: Study) -> dict[str, Any]:
    """What the study would take with the section `paper`: each variant, and all runs and trials of tuning together.

    Raises:
        StudyError: the study has no such section, or a variant cannot be made of its recipe.
    """
    paper = study.paper
    if paper is None:
        raise StudyError(f"the study '{study.title}' has no section paper, so there is nothing to plan. Add one.")
    variants = {variant: _planned(study, paper, variant) for variant in study.variants}
    trials = [tuning_cell(study, group, {}) for group in tuned_groups(study)] * (study.tune.trials if study.tune else 0)
    runs = cells(study, {})
    each = {variant: one["hours"] if one else 0.0 for variant, one in variants.items()}
    hours = sum(each[cell.variant] * _share_of_run(study, cell) for cell in [*runs, *trials])
    return {
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "recipe": "/".join(paper.recipe.parts[-3:]),
        "gpus": paper.gpus,
        "gpu": paper.gpu,
        "rows": paper.rows,
        "variants": variants,
        "runs": len(runs),
        "trials": len(trials),
        "gpu_hours": round(hours, 1),
    }


def _planned(study: Study, paper: Paper, variant: str) -> dict[str, Any] | None:
    """What a run of a variant takes, as plan.json holds it; None where nothing is trained."""
    from maskft.plan.sizes import parse_size

    recipe = paper_recipe(study, paper, variant)
    if is_fixed(recipe.method):
        return None
    taken = demand(recipe)
    epochs = paper.epochs.get(variant, 1.0) if isinstance(paper.epochs, dict) else paper.epochs
    parts = {"language": taken["language_weights"], "vision": taken["vision_weights"]}
    return {
        **{key: taken[key] for key in ("bytes", "bytes_of_copies", "base_parameters", "trainable_parameters")},
        "fits": taken["bytes_of_copies"] <= parse_size(paper.gpu),
        "epochs": epochs,
        "hours": round(gpu_hours(epochs * paper.rows, **parts, gradients=taken["gradients"]), 3),
    }


def paper_recipe(study: Study, paper: Paper, variant: str) -> Recipe:
    """The paper's recipe with the variant's model and method, and the first values of such axes."""
    axes = {key: axis.values[0] for key, axis in study.vary.items() if variant in (axis.variants or study.variants)}
    settings = {
        key: _without_step(value) for key, value in {**study.variants[variant], **axes}.items() if _of_method(key)
    }
    base = {} if paper.config is None else {"model.base": str(paper.config)}
    try:
        return load_recipe(paper.recipe, as_overrides({**base, **settings}))
    except ValueError as error:
        raise StudyError(f"the variant {variant} cannot be made of {paper.recipe}. {error}") from error


def _of_method(key: str) -> bool:
    """Whether a setting belongs to the model or method, and not to the learning rate, which the recipe has."""
    return key.partition(".")[0] in ("model", "method") and key != f"method.{_STEP}"


def _without_step(value: Any) -> Any:
    """A whole section `method`, or a setting in it, likewise."""
    return {key: own for key, own in value.items() if key != _STEP} if isinstance(value, Mapping) else value


def _share_of_run(study: Study, cell: Cell) -> float:
    """What share of its variant's epochs a run makes: by the share of the data, and in tuning by the steps."""
    share = float(cell.settings.get(_DATA, 1.0))
    if cell.stage == "run" or study.tune is None:
        return share
    tune: Settings = study.tune.overrides
    share = float(tune.get(_DATA, share))
    steps: Mapping[str, Any] = {**study.overrides, **study.variants[cell.variant], **cell.settings}
    return share * tune[_STEPS] / steps[_STEPS] if _STEPS in tune and _STEPS in steps else share


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    for argument in arguments:
        file = Path(argument)
        path = file.with_suffix("") / PLAN
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan_study(load_study(file)))
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
