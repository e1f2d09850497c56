"""Size of adapters on disk, in bits per weight, with the seconds to write and to read them, for every storage.

    python benchmarks/adapter_sizes.py [ADAPTER ...] [--dtype bfloat16] [--out benchmarks/adapter_sizes.csv]

ADAPTER is a saved adapter's folder, its scores in full. Without one, two untrained adapters are made on the embedded
base, with offsets from N(0, 0.3): "topk" at keep ratio 0.9, and "soft". Reading means decoding every tensor to what
the gate takes, one at a time; writing includes reading the scores in full. Rows are printed and appended to a CSV file
with versions and machine.
"""

from __future__ import annotations

import argparse
import csv
import platform
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from maskft import MaskConfig
from maskft.adapters import pack
from maskft.adapters.files import SavedAdapter, needs_base
from maskft.tuner import attach
from maskft.tuner.config import BIT_GATES
from maskft.tuner.packed import mask_offsets
from maskft.vlm.load import load_model


def made(folder: Path, dtype: str, **fields: Any) -> Path:
    """An untrained adapter of the embedded base with random offsets."""
    model = attach(load_model("embedded", dtype=dtype), MaskConfig(**fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, scores in model.named_parameters():
            if "mask_scores" in name:
                scores.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def read_seconds(folder: Path) -> float:
    """Seconds to decode every score."""
    started = time.perf_counter()
    adapter = SavedAdapter(folder)
    for score in adapter.scores:
        found = adapter.read(score)
        if found.dtype == torch.bool:
            mask_offsets(found, adapter.config.gate)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="*", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of the base that topk masks are made with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/adapter_sizes.csv"))
    arguments = parser.parse_args()

    record = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": metadata.version("torch"),
        "maskft": metadata.version("maskft"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
    rows = []
    work = Path(tempfile.mkdtemp())
    try:
        folders = arguments.adapters or [
            made(work / "random-topk-0.9", arguments.dtype, gate="topk", keep_ratio=0.9),
            made(work / "random-soft", arguments.dtype, gate="soft"),
        ]
        for folder in folders:
            source = SavedAdapter(folder)
            gate = source.config.gate
            for storage in ("float32", "bits") if gate in BIT_GATES else ("float32", "int8", "int4"):
                name = source.config.base_model_name_or_path
                model = load_model(name, dtype=arguments.dtype) if needs_base(source, storage) else None
                out = work / "packed"
                started = time.perf_counter()
                packed = pack(folder, out, storage, model=model)
                seconds = time.perf_counter() - started
                row = {
                    "adapter": folder.name,
                    "gate": gate,
                    "storage": storage,
                    "scores": packed.scores,
                    "bytes": packed.bytes_after,
                    "bits_per_score": f"{packed.bits_per_score:.4f}",
                    "write_s": f"{seconds:.2f}",
                    "read_s": f"{read_seconds(out):.2f}",
                    "gate_error_rms": "" if packed.gate_error_rms is None else f"{packed.gate_error_rms:.2e}",
                    "gate_error_max": "" if packed.gate_error_max is None else f"{packed.gate_error_max:.2e}",
                }
                rows.append({**record, **row})
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(work)
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
