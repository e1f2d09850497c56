"""The peak memory of one of two processes with FSDP2 as `maskft plan --ranks 2` predicts it, beside the measured one.

    python benchmarks/plan_ranks.py [--only TEXT] [--out benchmarks/plan_ranks.csv]

Two processes with gloo train a base with random weights on this machine's CPU, in pieces that are made as
`maskft train` makes them: on the meta device, each decoder layer by itself, then the rest. Measured is what
`plan_check.py` measures, in the process that has more.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import append, provenance
from plan_check import WARM_LAYERS, Case, resident, skeleton, way
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from maskft.plan.predict import Predictor
from maskft.plan.skeleton import Skeleton
from maskft.plan.step import Load, batch, make_loss

RANKS = 2
CASES = [
    Case("SmolLM2-135M", "S-MFT fast", 1, 512),
    Case("SmolLM2-135M", "LoRA r16", 1, 512),
    Case("Llama-like 300M", "S-MFT fast", 1, 512),
]


def train(base: Skeleton, method: str, load: Load, steps: int) -> None:
    """Steps on random weights in pieces; the peak is counted anew after the first."""
    model = way(base, method).in_pieces().attached(base, None)
    for layer in model.get_base_model().get_submodule(base.stack).children():
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local.detach().normal_(0, 0.02) if local.is_floating_point() else local.zero_()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    loss = make_loss(model, batch(load, model.config, None), load)
    for step in range(steps):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(case: Case, rank: int, meeting: str) -> int:
    """Bytes at the peak of a step, beside those of a process that does nothing."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    few = Case(case.base, case.method, 1, max(16, case.tokens // 4)).load()
    train(skeleton(case.base, WARM_LAYERS), case.method, few, 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    train(skeleton(case.base), case.method, case.load(), 3)
    peak = resident("VmHWM") - before
    dist.destroy_process_group()
    return peak


def together(place: int) -> int:
    """The larger peak of the processes that train one case."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, __file__, "--measure", str(place), str(rank), f"{folder}/meeting"] for rank in range(RANKS)
        ]
        processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True, env=environment) for c in commands]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process failed")
    return max(json.loads(text.splitlines()[-1]) for text in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases that hold this text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plan_ranks.csv"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        place, rank, meeting = arguments.measure
        print(json.dumps(measure(CASES[int(place)], int(rank), meeting)))
        return
    for place, case in enumerate(CASES):
        if arguments.only not in f"{case.base} {case.method}":
            continue
        predictor = Predictor(skeleton(case.base))
        peak = predictor.predict(way(predictor.skeleton, case.method), case.load(), ranks=RANKS)
        measured = together(place)
        row = {
            **provenance(),
            "base": case.base,
            "method": case.method,
            "rows": case.rows,
            "tokens": case.tokens,
            "ranks": RANKS,
            "predicted_mb": f"{peak.total / 1e6:.1f}",
            "measured_mb": f"{measured / 1e6:.1f}",
            "ratio": f"{peak.total / measured:.3f}",
        }
        print(*(row[key] for key in list(row)[-8:]), sep="  ", flush=True)
        append(arguments.out, [row])


if __name__ == "__main__":
    main()
