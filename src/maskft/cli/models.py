"""The subcommands that make base models. Each one's work is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; default that of the language model as stored.")
]
Output = Annotated[Path, typer.Option(help="New folder for the Transformers model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


def add_commands(app: typer.Typer) -> None:
    """Add `compose` and `import` to the command line."""
    app.command()(compose)
    app.command(name="import")(import_checkpoint)


def compose(
    vision: Annotated[str, typer.Option(help="Vision tower: a folder or hub id, such as SigLIP, CLIP, DINOv2 or ViT.")],
    language: Annotated[str, typer.Option(help="Language model: a folder or hub id of a causal language model.")],
    output: Output,
    projector: Annotated[str, typer.Option(help="mlp2x_gelu or linear.")] = "mlp2x_gelu",
    vision_layer: Annotated[int, typer.Option(help="The tower's hidden state that is used; -1 is the last.")] = -2,
    features: Annotated[str, typer.Option(help="patch (without the class token) or full.")] = "patch",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(help="Draws the projector.")] = 0,
    projector_weights: Annotated[
        Path | None, typer.Option(help="A trained projector: the projector.safetensors of a run.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Compose a vision-language model from a vision tower, a new projector and a language model."""
    from maskft.cli.compose import run

    run(
        vision,
        language,
        output,
        projector=projector,
        vision_layer=vision_layer,
        features=features,
        dtype=dtype,
        seed=seed,
        weights=projector_weights,
        as_json=json,
    )


def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="A checkpoint of TinyLLaVA Factory.")],
    output: Output,
    dtype: Dtype = None,
    json: AsJson = False,
) -> None:
    """Turn a checkpoint of TinyLLaVA Factory into an ordinary Transformers model."""
    from maskft.cli.compose import run_import

    run_import(folder, output, dtype=dtype, as_json=json)
