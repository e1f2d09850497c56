"""A run that is killed again and again, each time at a random event, until it is through.

    python -m tests.faults.killed RECIPE OUTPUT KILLS EVENTS [key=value ...]

An event is a file being opened for writing, renamed, removed or made in the run folder: several for every step and
every file of a checkpoint. Each life is a fork of this process, which has imported everything and computed nothing.
It ends itself by SIGKILL at an event from 1 to EVENTS, drawn with a fixed seed. Prints the events of each death.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

from maskft.recipe import load_recipe
from maskft.training import train

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def live(recipe_file: Path, overrides: list[str], output: Path, deadly: int | None) -> bool:
    """Train in a fork that dies at the given event; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if deadly is not None:
                _die_at(output, deadly)
            train(load_recipe(recipe_file, overrides), output)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def _die_at(output: Path, deadly: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))  # type: ignore[call-overload]
        if (writes or event in _CHANGES) and str(arguments[0]).startswith(str(output)):
            seen += 1
            if seen == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(recipe_file: Path, output: Path, kills: int, events: int, overrides: list[str]) -> None:
    draw = random.Random(kills)
    deaths = []
    for _ in range(kills):
        deadly = draw.randint(1, events)
        if live(recipe_file, overrides, output, deadly):
            break
        deaths.append(deadly)
    live(recipe_file, overrides, output, None)
    print(json.dumps(deaths))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
