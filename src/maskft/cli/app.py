"""The subcommands. Each one's module, and what it needs, is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import maskft
from maskft.cli import models, research, studying

app = typer.Typer(
    name="maskft",
    help="Mask fine-tuning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
RunFolder = Annotated[Path, typer.Argument(help="A finished run's folder.")]


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
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or the name of a shipped one: quickstart.")],
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
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe; without a name, list all.")] = None,
    json: AsJson = False,
) -> None:
    """List the recipes that ship with the package, or print one to make your own of."""
    from maskft.cli.recipes import run

    run(name, as_json=json)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe; its data and its base's processor are used.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example training.max_length=4096.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=0, help="Decode only so many images of each part; of the others read the headers.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    fix: Annotated[
        Path | None, typer.Option(help="New folder for copies of the data files without the rows that have flaws.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Check all rows and images of a recipe's data, and list every flaw."""
    from maskft.cli.check import run

    run(recipe, overrides or [], images=images, workers=workers, fix=fix, as_json=json)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or the name of a shipped one: quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example method.score_layout=low-rank.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB or 80GiB: says what fits.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a run on a CPU.")] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that share base and training state (FSDP2, ZeRO-3).")
    ] = 1,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row, images included; default training.max_length.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=0, help="Images of a row; default 1, where the model sees.")] = None,
    json: AsJson = False,
) -> None:
    """Predict the memory of one training step from the base's config alone, and say what to change first."""
    from maskft.cli.plan import run

    run(recipe, overrides or [], gpu=gpu, cpu=cpu, ranks=ranks, tokens=tokens, images=images, as_json=json)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A finished run's folder; with --benchmark also an adapter's or a model's, a hub id or embedded."
        ),
    ],
    benchmark: Annotated[
        list[str] | None, typer.Option(help="all, or a comma list of gqa, mmmu, mme, pope, scienceqa, textvqa.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A data file to ask instead of the run's own; with --benchmark the folder that holds gqa/, MMMU/ ..."
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(help="More runs or adapters on the same base; repeatable, or a comma list.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of answers and results; default MODEL/benchmarks.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions asked together; default 16.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default the run's, else bfloat16.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default the benchmark's own.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part: test (default), validation or train.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    show: Annotated[int | None, typer.Option(min=0, help="Questions to show with both answers; default 6.")] = None,
    json: AsJson = False,
) -> None:
    """Answer a run's held-out questions with base and tuned model; with --benchmark, answer and score benchmarks."""
    from maskft.cli.evaluate import run as command

    asked = {
        "data": data,
        "adapters": adapters,
        "output": output,
        "batch_size": batch_size,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
    }
    command(model, benchmark, {"split": split, "show": show}, asked, limit=limit, as_json=json)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="New folder for the merged Transformers model.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; default the run's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a weight file, such as 500MB.")] = "5GB",
    quantize: Annotated[
        str | None, typer.Option(help="Save the language model in few bits: nf4, fp4, int8 or int8-torchao.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Multiply the mask into the weights and save an ordinary Transformers model."""
    from maskft.cli.export import run as command

    command(run, out, dtype=dtype, max_shard_size=max_shard_size, quantize=quantize, as_json=json)


@app.command()
def gguf(
    model: Annotated[Path, typer.Argument(help="An exported model's folder.")],
    out: Annotated[Path, typer.Argument(help="New file.")],
    dtype: Annotated[str, typer.Option(help="Of matrices: f16 or f32.")] = "f16",
    json: AsJson = False,
) -> None:
    """Write the language model of an exported folder as a GGUF file, for llama.cpp."""
    from maskft.cli.gguf import run

    run(model, out, dtype=dtype, as_json=json)


@app.command()
def pack(
    adapter: Annotated[Path, typer.Argument(help="A saved adapter's folder, or a finished run's.")],
    out: Annotated[Path, typer.Argument(help="New folder for the packed adapter.")],
    storage: Annotated[
        str, typer.Option(help="int8 or int4 (soft gates), bits (hard gates), float32 (write it in full again).")
    ],
    keep_scores: Annotated[
        bool, typer.Option("--keep-scores", help="Also keep the scores in full, as scores.safetensors.")
    ] = False,
    forget_base: Annotated[
        bool, typer.Option("--forget-base", help="Leave the base's fingerprint out: it loads on any base that fits.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the base, where it is needed: as trained in; default the run's, else bfloat16."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Write an adapter in few bits a weight. A run's recipe goes with it."""
    from maskft.cli.pack import run

    run(
        adapter,
        out,
        storage=storage,
        keep_scores=keep_scores,
        forget_base=forget_base,
        dtype=dtype,
        as_json=json,
    )


@app.command()
def combine(
    operation: Annotated[str, typer.Argument(help="union, intersection, interpolate or product.")],
    adapters: Annotated[list[Path], typer.Argument(help="Two or more saved adapters on one base.")],
    output: Annotated[Path, typer.Option(help="New folder for the combined adapter.")],
    weights: Annotated[
        str | None, typer.Option(help="One for each adapter, for interpolate and product; for example 0.5,0.5.")
    ] = None,
    gate: Annotated[str | None, typer.Option(help="The result's gate: soft, normalized or centered.")] = None,
    json: AsJson = False,
) -> None:
    """Combine adapters on one base into a new one."""
    from maskft.cli.combine import run

    run(operation, adapters, output, weights=weights, gate=gate, as_json=json)


@app.command()
def distance(
    a: Annotated[Path, typer.Argument(help="A saved adapter's folder.")],
    b: Annotated[Path, typer.Argument(help="Another on the same base.")],
    json: AsJson = False,
) -> None:
    """Measure how far apart two adapters on one base are."""
    from maskft.cli.combine import run_distance

    run_distance(a, b, as_json=json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more runs' folders.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default RUN/report.html, or report.html for several."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Write one self-contained page about runs: results, curves, masks, answers, settings."""
    from maskft.cli.report import run

    run(runs, output, as_json=json)


@app.command()
def inspect(
    adapters: Annotated[list[Path], typer.Argument(help="Runs, checkpoints or saved adapters.")],
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the base, to tell by how much the weights change.")
    ] = False,
    rank: Annotated[
        bool, typer.Option("--rank", help="Also the rank of the change of each matrix; implies --weights, and is slow.")
    ] = False,
    drift: Annotated[bool, typer.Option("--drift", help="Also how far the mask was at each checkpoint.")] = False,
    json: AsJson = False,
) -> None:
    """Show what masks have learnt by layer and module, and how much of it several have in common."""
    from maskft.cli.inspect import run

    run(adapters, weights=weights or rank, rank=rank, with_drift=drift, as_json=json)


@app.command(name="app")
def playground(
    base: Annotated[
        str, typer.Argument(help="A base: a model's folder, a hub id or embedded; or a run, with its mask.")
    ],
    more: Annotated[list[str] | None, typer.Argument(help="More runs or adapters.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Runs or adapters on the same base: several, or a comma list.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Open a page where base and masks answer side by side."""
    from maskft.cli.playground import run

    run(base, [*(adapters or []), *(more or [])], host=host, port=port, dtype=dtype, max_new_tokens=max_new_tokens)


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


@app.command()
def score(
    bench: Annotated[str, typer.Argument(help="gqa, mmmu, mme, pope, scienceqa or textvqa.")],
    answers: Annotated[Path, typer.Argument(help="Answers made by any tool: LLaVA's JSON lines.")],
    data: Annotated[Path, typer.Option(help="The folder that holds gqa/, MMMU/, MME/, pope/ and so on.")],
    json: AsJson = False,
) -> None:
    """Score answers to a benchmark as its official scorer does."""
    from maskft.cli.score import run

    run(bench, answers, data=data, as_json=json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="An evaluated run's folder; several seeds of it separated by commas.")],
    b: Annotated[str | None, typer.Argument(help="What to compare it with, likewise.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Compare with the base instead of another run.")] = False,
    split: Annotated[str, typer.Option(help="Held-out part: test or validation.")] = "test",
    json: AsJson = False,
) -> None:
    """Tell whether one run answers the same held-out questions better than another."""
    from maskft.cli.compare import run

    run(a, b, base=base, split=split, as_json=json)


for more in (models, research, studying):
    more.add_commands(app)
