"""Time of one training step (forward, backward, optimizer), as ratios to full fine-tuning in the same run.

    python benchmarks/bench_step.py [--tokens 2048] [--accumulate 1] [--rounds 7] [METHOD ...]

The model has SmolLM2-135M's shapes in bf16. All q, k, v, o, gate, up, down projections are adapted; full fine-tuning
trains the same weights, in bf16, with AdamW. The methods take turns, a step each, so that a change of the machine's
speed meets them all; medians of each round's ratio are printed and appended to a CSV file with versions and machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

import torch
from common import METHODS, VOCABULARY, append, provenance

from maskft.memory import keep_freed_memory

REFERENCE = "full fine-tuning"
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="names as in benchmarks/common.py; default: all in bf16")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048, help="per optimizer step and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("step.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory(-1)

    names = arguments.methods or [name for name in METHODS if not re.search("fp32|nf4|QLoRA", name)]
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    methods = {name: METHODS[name](arguments.layers, accumulate=arguments.accumulate > 1) for name in names}
    shape = (arguments.tokens // arguments.length, arguments.length)
    batches = [torch.randint(0, VOCABULARY, shape) for _ in range(arguments.accumulate)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds + WARM_UP):
        for name, method in methods.items():
            times[name].append(method.step(batches))
    record = {
        **provenance(),
        "layers": arguments.layers,
        "tokens": arguments.tokens,
        "accumulate": arguments.accumulate,
        "rounds": arguments.rounds,
    }
    rows = []
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken[WARM_UP:], times[REFERENCE][WARM_UP:], strict=True)]
        seconds, ratio = statistics.median(taken[WARM_UP:]), statistics.median(ratios)
        low, high = sorted(ratios)[len(ratios) // 4], sorted(ratios)[-1 - len(ratios) // 4]
        spread = f"{low:.3f}-{high:.3f}"
        rows.append({**record, "method": name, "seconds": f"{seconds:.3f}", "ratio": f"{ratio:.3f}", "middle": spread})
        print(f"{name:24} {seconds:7.3f} s   {ratio:.3f} of full fine-tuning ({spread})", flush=True)
    append(arguments.out, rows)


if __name__ == "__main__":
    main()
