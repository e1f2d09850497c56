"""maskft pack"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskft.cli.output import notes, print_json, quiet_libraries, result_console


def run(
    folder: Path,
    out: Path,
    *,
    storage: str,
    keep_scores: bool,
    forget_base: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    quiet_libraries()
    from maskft.adapters import pack
    from maskft.adapters.files import SavedAdapter, needs_base
    from maskft.folders import refuse_existing

    refuse_existing(out)
    source = SavedAdapter(folder, full=True)
    model = _base(folder, source.config.base_model_name_or_path, dtype) if needs_base(source, storage) else None
    started = time.perf_counter()
    packed = pack(
        folder,
        out,
        storage,
        keep_scores=keep_scores,
        forget_base=forget_base,
        model=model,
        beside=_run_files(folder, storage),
    )
    seconds = time.perf_counter() - started
    if as_json:
        report = {"adapter": str(folder), "packed": str(out), "storage": storage, **asdict(packed)}
        print_json({**report, "seconds": round(seconds, 2)})
    change = ""
    if packed.gate_error_rms is not None:
        change = f"gates change by {packed.gate_error_rms:.2g} (rms), at most {packed.gate_error_max:.2g}\n"
    result_console(as_json).print(
        f"{packed.scores:,} scores: {packed.bytes_before / 1e6:.1f} MB before, {packed.bytes_after / 1e6:.1f} MB now, "
        f"{packed.bits_per_score:.3f} bits each, in {seconds:.1f} s\n{change}adapter  {folder}\npacked   {out}"
    )


def _base(folder: Path, name: str | None, dtype: str | None) -> Any:
    """The base of a run, or else the one that the adapter names."""
    from maskft.errors import AdapterError
    from maskft.runs import RECIPE, run_recipe
    from maskft.vlm.load import load_model

    notes.print(f"loading the base of {folder}: a topk mask depends on its weights")
    if (folder / RECIPE).is_file():
        section = run_recipe(folder).model
        return load_model(
            section.base,
            dtype=dtype or section.dtype,
            trust_remote_code=section.trust_remote_code,
            quantization=section.quantization,
        )
    if name is None:
        raise AdapterError(f"{folder} names no base: base_model_name_or_path is missing in its adapter_config.json.")
    return load_model(name, dtype=dtype or "bfloat16")


def _run_files(folder: Path, storage: str) -> dict[str, str]:
    """What makes the packed adapter of a run a run of its own: recipe, training record without its scores, and card."""
    from maskft.card import CARD, model_card
    from maskft.runs import METRICS, RECIPE, read_metrics

    if not (folder / RECIPE).is_file():
        return {}
    found = {name: folder / name for name in (RECIPE, "environment.json") if (folder / name).is_file()}
    files = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    trained = {"train": metrics} if (metrics := read_metrics(folder).get("train")) else {}
    card = model_card(folder, adapter=True, storage=storage)
    return {**files, METRICS: json.dumps(trained, indent=2) + "\n", CARD: card}
