"""Peak memory of training, in bytes for each adapted weight beyond weights and activations.

    python benchmarks/bench_memory.py [--tokens 512] [--rounds 1] [--out FILE] [METHOD ...]

The model has SmolLM2-135M's shapes. Every method trains in a process of its own, which makes three steps; its peak is
the high-water mark of resident memory. The same model, trained without optimizer by freeing each gradient as it
arrives, gives the weights and activations that are taken off. Every process first compiles and runs each method on
one small layer, so that what code takes is in both figures. Rows are appended to a CSV file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import METHODS, VOCABULARY, Method, append, full, provenance

from maskft.optim import StepInBackward

BASE = "base"
NAMES = [BASE, *(name for name in METHODS if name not in ("HiRA r=16",))]
KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "2"}
"""Settings under which glibc gives freed tensors back at once."""


def base_alone(layers: int) -> Method:
    """Forward and backward of the base with every gradient freed at once; nothing is trained."""
    model = full(layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    StepInBackward(optimizer)
    return Method(model, optimizer)


def build(name: str, layers: int) -> Method:
    return base_alone(layers) if name == BASE else METHODS[name](layers)


def measure(name: str, layers: int, tokens: int) -> None:
    """Print the bytes that a method's training adds to a process, and how many weights it adapts."""
    torch.set_num_threads(2)
    small = [torch.randint(0, VOCABULARY, (1, 16))]
    for warm in NAMES:
        build(warm, 1).step(small)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    method = build(name, layers)
    for _ in range(3):
        method.step([torch.randint(0, VOCABULARY, (tokens // 256, 256))])
    print(resident("VmHWM") - before, sum(p.numel() for p in full(layers).parameters() if p.requires_grad))


def resident(field: str) -> int:
    """A figure of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="names as in benchmarks/common.py; default: all but HiRA")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("memory.csv"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.layers, arguments.tokens)
        return
    peaks: dict[str, int] = {}
    weights = 0
    names = [BASE, *(arguments.methods or [name for name in NAMES if name != BASE])]
    for name in names:
        command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
        command += ["--layers", str(arguments.layers), "--tokens", str(arguments.tokens)]
        taken = []
        for _ in range(arguments.rounds):
            done = subprocess.run(command, env={**os.environ, **KEPT}, capture_output=True, text=True, check=True)
            peak, weights = map(int, done.stdout.split()[-2:])
            taken.append(peak)
        peaks[name] = round(statistics.median(taken))
        beyond = (peaks[name] - peaks[BASE]) / weights
        print(f"{name:24} {peaks[name] / 2**20:7.0f} MiB   {beyond:6.2f} bytes per adapted weight", flush=True)
    record = {**provenance(), "layers": arguments.layers, "tokens": arguments.tokens, "rounds": arguments.rounds}
    append(
        arguments.out,
        [
            {**record, "method": name, "peak_bytes": peak, "bytes_per_weight": f"{(peak - peaks[BASE]) / weights:.2f}"}
            for name, peak in peaks.items()
        ],
    )


if __name__ == "__main__":
    main()
