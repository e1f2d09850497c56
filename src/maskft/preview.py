"""Everything a run would use, found out without training or writing into its folder: `maskft train --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskft.checkpoints import newest_sound
from maskft.guard import CHECKPOINTS
from maskft.methods import MaskMethod
from maskft.presence import absent
from maskft.recipe import Recipe
from maskft.training import prepare


def preview(recipe: Recipe, output: Path) -> dict[str, Any]:
    """The resolved recipe, training arguments, data, targets and parameter counts. What is not on this machine is
    named and left out; without weights the model is made from its config.

    Raises:
        RecipeError, DataError, ModelError: as `train`.
    """
    lacking = absent(recipe)
    ready = prepare(recipe, output, lambda text: None, lacking)
    checkpoint, _ = newest_sound(output / CHECKPOINTS)
    arguments = ready.arguments
    adapted = list(getattr(ready.model, "targeted_module_names", []))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "output": str(output),
        **{f"{name}_examples": len(part) for name, part in ready.parts.items()},
        "longest_example_tokens": ready.longest or None,
        "rows_per_step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "base_parameters": ready.base_parameters,
        "trainable_parameters": ready.trainable,
        "masked_modules": adapted if isinstance(recipe.method, MaskMethod) else [],
        "adapted_modules": [] if isinstance(recipe.method, MaskMethod) else adapted,
        "whole_parameters": _whole(ready.model),
        "would_resume_from": str(checkpoint) if checkpoint else None,
        "missing": lacking.lines(recipe.model.base),
        "training_arguments": arguments.to_dict(),
    }


def _whole(model: Any) -> list[str]:
    """Names of the base's own parameters that are trained whole, as the base has them."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not hasattr(model, "get_base_model"):
        return trained
    inside = (name.split(".modules_to_save.default.") for name in trained if ".modules_to_save." in name)
    return [f"{around.removeprefix('base_model.model.')}.{own}" for around, own in inside]
