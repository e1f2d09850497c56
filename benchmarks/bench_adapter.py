"""Sizes of adapters, and times to save, load, merge and switch them, on the embedded base.

    python benchmarks/bench_adapter.py [--rounds 5] [--out FILE]

Masks of every storage beside LoRA of rank 16, with random scores; medians. Switching is measured three ways: PEFT's
`set_adapter`, merging anew, and a bank of hard masks at one bit a weight. `forward` is one pass over 512 tokens, as a
ratio to the base's in the same round. Rows are appended to a CSV file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import append, provenance
from peft import LoraConfig, PeftModel, get_peft_model

from maskft import MaskConfig
from maskft.adapters import MaskBank
from maskft.memory import keep_freed_memory
from maskft.vlm.load import load_model

LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
KINDS: dict[str, Any] = {
    "soft mask, fp32": MaskConfig(target_modules=LAYERS),
    "soft mask, int8": MaskConfig(target_modules=LAYERS, storage="int8"),
    "soft mask, int4": MaskConfig(target_modules=LAYERS, storage="int4"),
    "hard mask, bits": MaskConfig(target_modules=LAYERS, gate="topk", keep_ratio=0.9, storage="bits"),
    "low-rank mask r=16": MaskConfig(target_modules=LAYERS, score_layout="low-rank", rank=16),
    "LoRA r=16": LoraConfig(r=16, target_modules=LAYERS),
}


def base() -> Any:
    return load_model("embedded", dtype="bfloat16").eval()


def make(folder: Path, config: Any, seed: int) -> None:
    """A saved adapter with random scores."""
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    model.requires_grad_(False)
    model.save_pretrained(folder)


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def row(name: str, folder: Path, rounds: int) -> Iterator[tuple[str, float]]:
    """What there is to say of a kind of adapter, saved twice in folder/a and folder/b."""
    yield "bytes", sum(file.stat().st_size for file in (folder / "a").glob("*.safetensors"))
    yield (
        "load_s",
        statistics.median(seconds(lambda: PeftModel.from_pretrained(base(), str(folder / "a"))) for _ in "abc"),
    )
    model = PeftModel.from_pretrained(base(), str(folder / "a"))
    model.load_adapter(str(folder / "b"), "b")
    times: dict[str, list[float]] = {"save_s": [], "merge_s": [], "set_adapter_s": [], "merge_switch_s": []}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            times["save_s"].append(seconds(lambda: model.save_pretrained(scratch, selected_adapters=["default"])))
        here, there = ("b", "default") if turn % 2 else ("default", "b")
        model.set_adapter(here)
        times["merge_s"].append(seconds(model.merge_adapter))
        times["merge_switch_s"].append(seconds(partial(_switch_merged, model, there)))
        model.unmerge_adapter()
        times["set_adapter_s"].append(seconds(partial(model.set_adapter, here)))
    yield from ((key, statistics.median(taken)) for key, taken in times.items())


def _switch_merged(model: Any, name: str) -> None:
    model.unmerge_adapter()
    model.set_adapter(name)
    model.merge_adapter()


def bank_times(folder: Path, rounds: int) -> dict[str, float]:
    """Adding a hard mask to a bank, and switching between two."""
    model = base()
    bank = MaskBank(model)
    added = [seconds(lambda name=name: bank.add(name, folder / name)) for name in "ab"]
    switched = [seconds(lambda name=name: bank.use(name)) for name in "ab" * rounds]
    return {"bank_add_s": statistics.median(added), "bank_switch_s": statistics.median(switched[2:])}


def forward_ratio(folder: Path, rounds: int) -> float:
    """Time of a pass of the merged model over that of the base, paired; the median of each round's ratio."""
    models = [base(), PeftModel.from_pretrained(base(), str(folder / "a")).merge_and_unload()]
    ids = torch.randint(0, 1000, (1, 512))
    ratios = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            taken = [seconds(lambda model=model: model(input_ids=ids, use_cache=False)) for model in models]
            ratios.append(taken[1] / taken[0])
    return statistics.median(ratios[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("adapter.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory(-1)
    columns = ("bytes", "save_s", "load_s", "merge_s", "set_adapter_s", "merge_switch_s", "bank_add_s", "bank_switch_s")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in KINDS.items():
            folder = Path(scratch) / name.replace(" ", "-")
            for seed, which in enumerate("ab"):
                make(folder / which, config, seed)
            found = dict(row(name, folder, arguments.rounds))
            if "bits" in name:
                found |= bank_times(folder, arguments.rounds)
            ratio = forward_ratio(folder, 2 * arguments.rounds + 1)
            cells = {column: f"{found[column]:.4g}" if column in found else "" for column in columns}
            rows.append({**provenance(), "adapter": name, **cells, "merged_forward_ratio": f"{ratio:.3f}"})
            print("  ".join(f"{key} {value}" for key, value in [("", name), *cells.items(), ("ratio", f"{ratio:.3f}")]))
    append(arguments.out, rows)


if __name__ == "__main__":
    main()
