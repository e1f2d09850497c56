"""The peak memory of a step as `maskft plan` predicts it, beside the one measured on this machine's CPU.

    python benchmarks/plan_check.py [--only TEXT] [--out benchmarks/plan_check.csv]

Each case runs in a process of its own with random weights. Measured is the largest resident memory in the second and
third step, less what the process has after importing everything and training a model of two layers in the same way.
Freed tensors go back to the kernel at once (MALLOC_MMAP_THRESHOLD_), so that resident memory is memory in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import append, provenance
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from maskft import MaskConfig
from maskft.memory import MODES, score_optimizer
from maskft.plan.predict import Predictor
from maskft.plan.skeleton import Skeleton, imagine, replace_tensors
from maskft.plan.step import Load, batch, image_tokens, make_loss
from maskft.plan.ways import PLAIN, SAME, Way, with_mode
from maskft.vlm.load import load_skeleton

WARM_LAYERS = 2


def llama(**shape: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048, **shape)


BASES = {
    "SmolLM2-135M": llama(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ),
    "Llama-like 300M": llama(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4
    ),
}
"""Shapes; "embedded" is the third base."""


@dataclass(frozen=True)
class Case:
    """One base, method and load."""

    base: str
    method: str
    rows: int
    tokens: int
    checkpointing: bool = False

    def load(self) -> Load:
        return Load(
            batch=self.rows,
            tokens=self.tokens,
            images=1 if self.base == "embedded" else 0,
            checkpointing=self.checkpointing,
            autocast=torch.bfloat16,
            device="cpu",
        )


CASES = [
    Case("SmolLM2-135M", "S-MFT fast", 1, 512),
    Case("SmolLM2-135M", "LoRA r16", 1, 512),
    Case("SmolLM2-135M", "S-MFT tight", 1, 512),
    Case("SmolLM2-135M", "full, bf16", 1, 512),
    Case("SmolLM2-135M", "S-MFT balanced", 1, 512),
    Case("SmolLM2-135M", "LoRA r16", 1, 2048),
    Case("embedded", "S-MFT fast", 8, 128),
    Case("embedded", "LoRA r16", 8, 128),
    Case("SmolLM2-135M", "S-MFT fast", 1, 2048),
    Case("Llama-like 300M", "S-MFT fast", 1, 512),
    Case("Llama-like 300M", "full, fp32", 1, 512),
    Case("Llama-like 300M", "S-MFT tight", 1, 512),
    Case("SmolLM2-135M", "S-MFT tight", 1, 2048, checkpointing=True),
    Case("SmolLM2-135M", "S-MFT tight", 4, 512),
    Case("SmolLM2-135M", "H-MFT fast", 1, 512),
    Case("embedded", "S-MFT tight", 8, 128),
]


def skeleton(base: str, layers: int | None = None) -> Skeleton:
    """The base's shapes, with fewer layers where `layers` is given."""
    if base == "embedded":
        model = load_skeleton("embedded", dtype="bfloat16")
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(BASES[base], dtype=torch.bfloat16)
    found = Skeleton(model.requires_grad_(False).eval())
    return found if layers is None else Skeleton(found.shortened(layers))


def way(base: Skeleton, method: str) -> Way:
    name, _, setting = method.partition(" ")
    config = base.targets(MaskConfig(gate="topk" if name == "H-MFT" else "soft"))
    if name == "LoRA":
        return Way(method, "lora", PLAIN, config, 16)
    if name == "full,":
        return Way(
            method, "full", *((SAME, config) if setting == "bf16" else (PLAIN, config, 0, "none", torch.float32))
        )
    return with_mode(method, config, MODES[setting], "none")


def drawn(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with random values, or zeros, in place of one on the meta device."""
    new = torch.empty(tensor.shape, dtype=tensor.dtype)
    return new.normal_(0, 0.02) if new.is_floating_point() else new.zero_()


def train(base: Skeleton, method: str, load: Load, steps: int) -> None:
    """Steps on random weights; the peak is counted anew after the first."""
    chosen = way(base, method)
    model = chosen.attached(base, None)
    image = None
    if load.images:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        imagined = base.shortened(None)
        imagine(imagined, fake)
        found = image_tokens(imagined, fake)
        assert found is not None
        image = found[0], {name: torch.empty(value.shape, dtype=value.dtype) for name, value in found[1].items()}
    replace_tensors(model, drawn)
    model.train()
    if load.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    if chosen.kind == "mask":
        optimizer = score_optimizer(model, method.partition(" ")[2], lr=0.01)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    inputs = batch(load, model.config, image)
    for name in inputs.keys() - {"input_ids", "labels", "attention_mask"}:
        inputs[name].normal_()
    loss = make_loss(model, inputs, load)
    for step in range(steps):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(field: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(case: Case) -> int:
    """Bytes at the peak of a step, beside those of a process that does nothing."""
    few = replace(case.load(), batch=1, tokens=max(16, case.tokens // 4) if case.base != "embedded" else case.tokens)
    train(skeleton(case.base, WARM_LAYERS), case.method, few, 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    train(skeleton(case.base), case.method, case.load(), 3)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases that hold this text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plan_check.csv"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(CASES[arguments.measure])))
        return
    predictors: dict[str, Predictor] = {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for place, case in enumerate(CASES):
        if arguments.only not in f"{case.base} {case.method}":
            continue
        if case.base not in predictors:
            predictors[case.base] = Predictor(skeleton(case.base))
        predictor = predictors[case.base]
        peak = predictor.predict(way(predictor.skeleton, case.method), case.load())
        command = [sys.executable, __file__, "--measure", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        measured = json.loads(done.stdout.splitlines()[-1])
        row = {
            **provenance(),
            "base": case.base,
            "method": case.method,
            "rows": case.rows,
            "tokens": case.tokens,
            "checkpointing": case.checkpointing,
            "predicted_mb": f"{peak.total / 1e6:.1f}",
            "measured_mb": f"{measured / 1e6:.1f}",
            "ratio": f"{peak.total / measured:.3f}",
            "peak": peak.moment,
        }
        print(*(row[key] for key in list(row)[-9:]), sep="  ", flush=True)
        append(arguments.out, [row])


if __name__ == "__main__":
    main()
