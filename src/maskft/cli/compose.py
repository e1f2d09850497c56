"""maskft compose, maskft import"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskft.cli.output import notes, print_json, quiet_libraries, result_console


def run(
    vision: str,
    language: str,
    output: Path,
    *,
    projector: str,
    vision_layer: int,
    features: str,
    dtype: str | None,
    seed: int,
    weights: Path | None,
    as_json: bool,
) -> None:
    quiet_libraries()
    from maskft.vlm.compose import compose

    notes.print(f"composing {vision} and {language}", markup=False)
    made = compose(
        vision,
        language,
        output,
        projector=projector,
        vision_layer=vision_layer,
        features=features,
        dtype=dtype,
        seed=seed,
        weights=weights,
    )
    show(made, as_json=as_json)
    if weights is None:
        notes.print("The projector is untrained. Align it first: recipes/stage1-llava.yaml.")


def run_import(folder: Path, output: Path, *, dtype: str | None, as_json: bool) -> None:
    quiet_libraries()
    from maskft.vlm.tinyllava import import_tinyllava

    notes.print(f"importing {folder}", markup=False)
    show(import_tinyllava(folder, output, dtype=dtype), as_json=as_json)


def show(made: Mapping[str, Any], *, as_json: bool) -> None:
    """Say what was written."""
    if as_json:
        print_json(made)
    sizes = made["parameters"]
    grown = ", for which the embeddings grew by a row" if made["embeddings_grown"] else ""
    lines = [
        f"vision tower  {made['vision']}, {sizes['vision']:,} parameters, hidden state {made['vision_layer']}, "
        f"{made['image_tokens']} tokens an image",
        f"projector     {made['projector']}, {sizes['projector']:,} parameters",
        f"language      {made['language']}, {sizes['language']:,} parameters",
        f"image token   {made['image_token']} ({made['image_token_is']}, id {made['image_token_id']}){grown}",
    ]
    if made["head_bias_absorbed"] is not None:
        lines.append(
            f"head          its bias is now in the head's weight and the last norm; logits moved by at most "
            f"{made['head_bias_absorbed']:.2g}"
        )
    lines.append(f"model         {made['model']} ({made['dtype']})")
    result_console(as_json).print("\n".join(lines), markup=False)
