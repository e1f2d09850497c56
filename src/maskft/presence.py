"""What a recipe names and this machine does not have yet, so that a dry run can look at the rest."""

from __future__ import annotations

from dataclasses import dataclass

from maskft.recipe import EasyVqaData, Recipe
from maskft.vlm.load import has_processor, has_weights


@dataclass(frozen=True)
class Absent:
    """What is not there.

    Attributes:
        data: data files and the folder of images, as "key: path".
        processor: whether the base's folder has no processor.
        weights: whether the base's folder has no weights, or they would have to be downloaded.
    """

    data: tuple[str, ...] = ()
    processor: bool = False
    weights: bool = False

    def lines(self, base: str) -> list[str]:
        """Each as a sentence with what follows from it."""
        found = [f"{line} does not exist, so no rows were looked at" for line in self.data]
        if self.processor:
            found.append(f"model.base: {base} has no processor, so no tokens were counted")
        if self.weights:
            found.append(f"model.base: {base} has no weights here; modules and numbers are those of its config.json")
        return found


NOTHING = Absent()
"""All is there."""


def absent(recipe: Recipe) -> Absent:
    """Look for files and folders, without opening any.

    Raises:
        ModelError: there is no such base.
    """
    base = recipe.model.base
    return Absent(_data(recipe), not has_processor(base), not has_weights(base))


def _data(recipe: Recipe) -> tuple[str, ...]:
    data = recipe.data
    if isinstance(data, EasyVqaData):
        return ()
    named = {name: getattr(data, name) for name in ("train", "validation", "test")}
    missing = [f"data.{name}: {path}" for name, path in named.items() if path is not None and not path.exists()]
    if data.image_root is not None and not data.image_root.is_dir():
        missing.append(f"data.image_root: {data.image_root}")
    return tuple(missing)
