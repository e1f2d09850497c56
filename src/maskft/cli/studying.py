"""The subcommands for many runs. Each one's work is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


def add_commands(app: typer.Typer) -> None:
    """Add `study` and `tune` to the command line."""
    app.command()(study)
    app.command()(tune)


def study(
    file: Annotated[Path, typer.Argument(help="A study's file, for example studies/gate.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Folder of runs and results; default runs/studies/NAME.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database that several machines share, as an SQLAlchemy URL; default SQLite.")
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Try everything on a tiny random base, in few runs.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of tuning, in place of the file's.")] = None,
    known: Annotated[
        Path | None, typer.Option(help="Folder of results of this study: those runs are not made again.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Train nothing: write the page of committed results into this folder.")
    ] = None,
    heartbeat: Annotated[int, typer.Option(min=1, help="Seconds between a worker's signs of life.")] = 30,
    json: AsJson = False,
) -> None:
    """Work on a study until it is finished. Several calls, on one or many machines, share the work."""
    from maskft.cli.study import run

    run(
        file,
        output,
        storage=storage,
        toy=toy,
        trials=trials,
        known=known,
        page=page,
        heartbeat=heartbeat,
        as_json=json,
    )


def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="The new recipe; default RECIPE with -tuned in its name.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Learning rates that are tried.")] = 6,
    share: Annotated[float, typer.Option(help="Of the training rows, and of the steps, that a trial takes.")] = 0.1,
    work: Annotated[Path | None, typer.Option(help="Folder for the trials; default runs/tune/<recipe name>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the new recipe.")] = False,
    storage: Annotated[str | None, typer.Option(help="Database that several machines share, as for study.")] = None,
    json: AsJson = False,
) -> None:
    """Find the learning rate on a slice of a recipe's data, and write the recipe with it."""
    from maskft.cli.tune import run

    new = output or recipe.with_name(f"{recipe.stem}-tuned.yaml")
    run(
        recipe,
        new,
        work or Path("runs/tune") / recipe.stem,
        trials=trials,
        share=share,
        force=force,
        storage=storage,
        as_json=json,
    )
