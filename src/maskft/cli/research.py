"""The subcommands that make data sets and analyse runs. Each one's work is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


def add_commands(app: typer.Typer) -> None:
    """Add `data` and `analyse` to the command line."""
    app.command(name="data")(make_data)
    app.command()(analyse)


def make_data(
    kind: Annotated[str, typer.Argument(help="stamps, clipart, digits or easy-vqa.")],
    output: Annotated[Path, typer.Option(help="New folder for the data set.")],
    source: Annotated[
        Path | None, typer.Option(help="Of stamps and clipart: / (default), or where their packages were unpacked.")
    ] = None,
    test: Annotated[
        float | None, typer.Option(help="Not of easy-vqa: share held out; default 0.25, of digits 0.3.")
    ] = None,
    validation: Annotated[float | None, typer.Option(help="Likewise; default 0.1, of digits 0.05.")] = None,
    size: Annotated[
        int | None, typer.Option(min=16, help="Likewise: longest side in pixels; default 224, of digits 64.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Of stamps and clipart: types of questions, joined by commas; default all.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Of easy-vqa: vqa (default) or captions.")] = None,
    split: Annotated[str | None, typer.Option(help="Of easy-vqa: official (default) or compositional.")] = None,
    labels: Annotated[str | None, typer.Option(help="Of easy-vqa: true (default) or random.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    json: AsJson = False,
) -> None:
    """Make a data set in LLaVA's form from pictures that people have labelled."""
    from maskft.cli.data import run

    given = {"source": source, "test": test, "validation": validation, "size": size, "questions": questions}
    given |= {"part": part, "split": split, "labels": labels}
    run(kind, output, given, seed=seed, as_json=json)


def analyse(
    name: Annotated[str, typer.Argument(help="agreement, bound, captions, drift, forgetting, gap or probes.")],
    runs: Annotated[list[Path], typer.Argument(help="Finished runs' folders.")],
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    json: AsJson = False,
) -> None:
    """Ask what runs learnt, kept and forgot; docs/analysis.md says how each is measured."""
    from maskft.cli.analyse import run

    run(name, runs, output, as_json=json)
