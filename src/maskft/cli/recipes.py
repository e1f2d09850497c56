"""maskft recipes"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.table import Table

from maskft.cli.output import print_json, result_console
from maskft.errors import RecipeError, did_you_mean
from maskft.shipped import shipped_recipes, summary


def run(name: str | None, *, as_json: bool) -> None:
    recipes = shipped_recipes()
    if name is not None:
        text = _named(name, recipes).read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "text": text})
        else:
            sys.stdout.write(text)
        return
    if as_json:
        print_json({key: summary(path) for key, path in recipes.items()})
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for key, path in recipes.items():
        table.add_row(key, summary(path))
    result_console(as_json).print(table)


def _named(name: str, recipes: dict[str, Path]) -> Path:
    if name not in recipes:
        raise RecipeError(
            f"no recipe '{name}' ships with maskft.{did_you_mean(name, recipes)} `maskft recipes` lists those that do."
        )
    return recipes[name]
