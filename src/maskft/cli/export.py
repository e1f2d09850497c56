"""maskft export"""

from __future__ import annotations

from pathlib import Path

from maskft.cli.output import notes, print_json, quiet_libraries, result_console
from maskft.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "fp4", "int8", "int8-torchao")


def run(
    folder: Path, out: Path, *, dtype: str | None, max_shard_size: str, quantize: str | None, as_json: bool
) -> None:
    _require("--dtype", dtype, DTYPES)
    _require("--quantize", quantize, QUANTIZATIONS)
    quiet_libraries()
    import torch

    from maskft.adapters.export import export_merged, require_size
    from maskft.card import model_card
    from maskft.data import Collator
    from maskft.folders import refuse_existing
    from maskft.learnt import result_name
    from maskft.runs import load_data, load_run
    from maskft.vlm.load import load_model, require_quantizer

    refuse_existing(out)
    require_size(max_shard_size)
    if quantize is not None:
        require_quantizer(quantize, "--quantize")
    notes.print(f"merging {folder}")
    loaded = load_run(folder)
    written = dtype or loaded.recipe.model.dtype
    rows = load_data(loaded.recipe)["train"]
    probe = Collator(loaded.processor, max_length=None).prompts([rows[i] for i in range(min(4, len(rows)))])
    exported = export_merged(
        loaded.model,
        loaded.processor,
        out,
        probe=probe,
        dtype=getattr(torch, written),
        max_shard_size=max_shard_size,
        quantize=None
        if quantize is None
        else lambda plain: load_model(str(plain), dtype=written, quantization=quantize),
        beside={"README.md": model_card(folder, quantization=quantize, dtype=written)},
    )
    if as_json:
        print_json(
            {
                "run": str(folder),
                "merged": str(out),
                "dtype": written,
                "quantization": quantize or "none",
                "largest_logit_difference": exported.difference,
                "largest_reload_difference": exported.reload_difference,
                "bytes": exported.bytes,
            }
        )
    exact = exported.rounding == 0 and quantize is None and loaded.recipe.method.name in ("mask", "full", "projector")
    result_console(as_json).print(
        f"largest difference of logits, before merging and after reloading: {exported.difference:g}"
        f"{' (bound: 0)' if exact else ''}\n{_why(exported.rounding, written, quantize)}"
        f"largest difference of logits, as written and after reloading: {exported.reload_difference:g} (bound: 0)\n"
        f"run           {folder}\nlearnt        {folder / result_name(loaded.recipe.method)}\n"
        f"merged model  {out}  ({exported.bytes / 1e6:.1f} MB)"
    )


def _require(option: str, given: str | None, allowed: tuple[str, ...]) -> None:
    if given is not None and given not in allowed:
        raise UserError(f"{option} is '{given}'; it must be one of {', '.join(allowed)}.")


def _why(rounding: float, dtype: str, quantize: str | None) -> str:
    """Where a difference to the run's model comes from."""
    cast = f"  {dtype} rounds a weight by at most 1/{round(1 / rounding)} of itself\n" if rounding else ""
    few = (
        f"  {quantize} rounds the merged weights of the language model: docs/quantised.md#merging\n" if quantize else ""
    )
    return cast + few
