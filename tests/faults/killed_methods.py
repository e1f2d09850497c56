"""Runs of several methods, each once left alone and once killed on its way.

    python -m tests.faults.killed_methods RECIPE OUTPUT METHOD ...

METHOD is the recipe's method as YAML. The runs of the n-th are OUTPUT/n-whole and OUTPUT/n-killed. Prints at how many
events the killed ones died (see `tests.faults.killed`), 0 for one that had ended by then.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tests.faults.killed import live


def main(recipe: Path, output: Path, methods: list[str]) -> None:
    draw = random.Random(0)
    deaths = []
    for n, method in enumerate(methods):
        overrides = [f"method={method}"]
        live(recipe, overrides, output / f"{n}-whole", None)
        deadly = draw.randint(6, 20)
        deaths.append(0 if live(recipe, overrides, output / f"{n}-killed", deadly) else deadly)
        live(recipe, overrides, output / f"{n}-killed", None)
    print(json.dumps(deaths))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
