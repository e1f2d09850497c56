"""Time of one training step (forward, backward, optimizer), as ratios to full fine-tuning in the same run.

    python benchmarks/bench_step.py [--layers 10] [--tokens 512] [--rounds 7] [--out benchmarks/step.csv]

The model has SmolLM2-135M's shapes with random bf16 weights and fewer layers. All q, k, v, o, gate, up, down
projections are adapted. The methods take turns, a step each, so that a change of the machine's speed meets them all;
medians over the rounds are printed and appended to a CSV file with versions and machine.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import maskft.tuner.layer
from maskft import MaskConfig
from maskft.linear import plain_masked_linear

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,  # a small head, so that the layers are what is timed
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def full(layers: int) -> torch.nn.Module:
    return base(layers)


def masked(layers: int) -> torch.nn.Module:
    return get_peft_model(base(layers), MaskConfig(target_modules=PROJECTIONS))


def lora(layers: int) -> torch.nn.Module:
    return get_peft_model(base(layers), LoraConfig(r=16, target_modules=PROJECTIONS))


def stepper(model: torch.nn.Module, ids: torch.Tensor, lr: float) -> Callable[[], float]:
    """A function that makes one step and returns its seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def plain_step(step: Callable[[], float]) -> Callable[[], float]:
    """The same step with the one-line autograd version in place of the custom function."""

    def one_mask(x, weight, bias, mask):  # type: ignore[no-untyped-def]
        return plain_masked_linear(x, weight, bias, [mask])

    def with_plain() -> float:
        fast = maskft.tuner.layer.masked_linear
        maskft.tuner.layer.masked_linear = one_mask
        try:
            return step()
        finally:
            maskft.tuner.layer.masked_linear = fast

    return with_plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)

    ids = torch.randint(0, 4096, (arguments.tokens // 128, 128))
    steps = {
        "full fine-tuning (bf16 AdamW)": stepper(full(arguments.layers), ids, 1e-5),
        "S-MFT, custom function": stepper(masked(arguments.layers), ids, 0.1),
        "S-MFT, plain autograd": plain_step(stepper(masked(arguments.layers), ids, 0.1)),
        "LoRA r=16": stepper(lora(arguments.layers), ids, 1e-3),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds + 2):
        for name, step in steps.items():
            times[name].append(step())
    reference = times["full fine-tuning (bf16 AdamW)"][2:]
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "torch": metadata.version("torch"),
        "peft": metadata.version("peft"),
        "maskft": metadata.version("maskft"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
    rows = []
    for name, taken in times.items():
        kept = taken[2:]  # the first two warm up
        ratio = statistics.median(a / b for a, b in zip(kept, reference, strict=True))
        rows.append({**record, "method": name, "median_s": f"{statistics.median(kept):.3f}", "ratio": f"{ratio:.2f}"})
        print(f"{name:32} {statistics.median(kept):7.3f} s   {ratio:.2f} of full fine-tuning")
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
