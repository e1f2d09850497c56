"""Recipes that ship with the package, so that a run needs no clone: `maskft train quickstart`.

In an installed package they lie beside this file, in a clone in the folder `recipes` at its top.
"""

from __future__ import annotations

from pathlib import Path

from maskft.errors import RecipeError, did_you_mean

_PACKAGE = Path(__file__).parent
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
_SUFFIX = ".yaml"


def shipped_recipes() -> dict[str, Path]:
    """Files by name: the path below the folder, without its suffix, such as "quickstart" or "distributed/fsdp2".

    Those of the folder itself come first.
    """
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    named = {path.relative_to(folder).as_posix().removesuffix(_SUFFIX): path for path in folder.rglob(f"*{_SUFFIX}")}
    return {name: named[name] for name in sorted(named, key=lambda name: (name.count("/"), name))}


def find_recipe(given: Path) -> Path:
    """The file `given`; where there is none, the shipped recipe of that name.

    A path that ends in .yaml or .yml always means a file of the user's.

    Raises:
        RecipeError: neither exists.
    """
    if given.suffix in (_SUFFIX, ".yml") or given.exists():
        return given
    recipes = shipped_recipes()
    if given.as_posix() not in recipes:
        raise RecipeError(
            f"cannot read the recipe {given}: No such file, and no recipe of that name ships with maskft."
            f"{did_you_mean(given.as_posix(), recipes)} `maskft recipes` lists those that do."
        )
    return recipes[given.as_posix()]


def summary(path: Path) -> str:
    """What a recipe is for: the first sentence of the comment at its head."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#") or not line.lstrip("# "):
            break
        head.append(line.lstrip("# "))
    sentence, stop, _ = " ".join(head).partition(". ")
    return sentence + stop.rstrip()
