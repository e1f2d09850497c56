"""The subcommands. Each one's module, and what it needs, is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import maskft

app = typer.Typer(
    name="maskft",
    help="Mask fine-tuning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
RunFolder = Annotated[Path, typer.Argument(help="A finished run's folder.")]
Split = Annotated[str, typer.Option(help="Held-out part: test or validation.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(maskft.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.max_steps=24.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe name>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print everything that would be used; write nothing.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Train a recipe. A repeated call on the same output resumes an interrupted run."""
    from maskft.cli.train import run

    run(recipe, overrides or [], output or Path("runs") / recipe.stem, dry_run=dry_run, as_json=json)


@app.command()
def evaluate(
    run: RunFolder,
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    show: Annotated[int, typer.Option(min=0, help="How many questions to show with both answers.")] = 6,
    json: AsJson = False,
) -> None:
    """Answer the held-out questions with base and tuned model, and score both."""
    from maskft.cli.evaluate import run as command

    command(run, split=split, limit=limit, show=show, as_json=json)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="New folder for the merged Transformers model.")],
    json: AsJson = False,
) -> None:
    """Multiply the mask into the weights and save an ordinary Transformers model."""
    from maskft.cli.export import run as command

    command(run, out, as_json=json)


@app.command()
def ask(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    json: AsJson = False,
) -> None:
    """Ask about an image: base and tuned answers side by side."""
    from maskft.cli.ask import run as command

    command(run, image, question, as_json=json)
