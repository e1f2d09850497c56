"""maskft train"""

from __future__ import annotations

from pathlib import Path

from maskft.cli.output import notes, print_json, quiet_libraries, result_console
from maskft.cli.report import leave_report
from maskft.errors import Paused
from maskft.recipe import Recipe, load_recipe


def run(recipe_path: Path, overrides: list[str], output: Path, *, dry_run: bool, as_json: bool) -> None:
    recipe = load_recipe(recipe_path, overrides)
    quiet_libraries()
    if dry_run:
        _dry_run(recipe, output, as_json)
        return
    from maskft.learnt import result_name
    from maskft.training import train
    from maskft.tuner.sharding import is_first_process, part_together

    try:
        metrics = train(recipe, output, say=notes.print)
    except Paused as paused:
        if as_json and is_first_process():
            done = {"step": paused.step, "of": paused.steps, "checkpoint": paused.checkpoint}
            print_json({"run": str(output), "paused": done})
        part_together()
        raise
    part_together()
    if not is_first_process():
        return
    trained = metrics["train"]
    if as_json:
        print_json({"run": str(output), **metrics})
    share = trained["trainable_parameters"] / trained["base_parameters"]
    result = result_name(recipe.method)
    loss = f"mean loss {trained['loss']:.3f}" if trained["steps"] else "a fixed mask"
    result_console(as_json).print(
        f"trained {trained['steps']} steps in {trained['seconds']:.0f} s, {loss}; "
        f"{trained['trainable_parameters']:,} trainable parameters ({100 * share:.1f} % of the base's)\n"
        f"run      {output}\nresult   {output / result}\n{leave_report(output)}next     maskft evaluate {output}"
    )


def _dry_run(recipe: Recipe, output: Path, as_json: bool) -> None:
    """Print the resolved recipe, training arguments, data and targets; write nothing into the run folder."""
    from maskft.preview import preview

    seen = preview(recipe, output)
    if as_json:
        print_json(seen)
        return
    console = result_console(as_json)
    console.print(recipe.to_yaml().rstrip())
    apart = ("recipe", "missing")
    console.print("\n".join(f"{key}: {value}" for key, value in seen.items() if key not in apart))
    for line in seen["missing"]:
        console.print(f"missing: {line}", markup=False)
