"""Models, methods and records that the benchmarks share."""

from __future__ import annotations

import csv
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import maskft.tuner.layer
from maskft import MaskConfig
from maskft.linear import plain_masked_linear
from maskft.memory import MODES, cache_weights, score_optimizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 49152


def smollm2(layers: int, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """SmolLM2-135M's shapes with random weights; speed and memory don't depend on their values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def in_nf4(layers: int) -> LlamaForCausalLM:
    """The same model with its linear layers in 4 bits, as QLoRA keeps them."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head"],
    )
    with tempfile.TemporaryDirectory() as folder:
        smollm2(layers).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(
            folder, quantization_config=quantised, device_map={"": "cpu"}, dtype=torch.bfloat16
        )


def full(layers: int, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The base with the weights trainable that the other methods adapt."""
    model = smollm2(layers, dtype)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            module.requires_grad_(True)
    return model


Build = Callable[[int], LlamaForCausalLM]


def masked(layers: int, base: Build = smollm2, **settings: Any) -> torch.nn.Module:
    return get_peft_model(base(layers), MaskConfig(target_modules=PROJECTIONS, **settings))


def lora(layers: int, base: Build = smollm2) -> torch.nn.Module:
    return get_peft_model(base(layers), LoraConfig(r=16, target_modules=PROJECTIONS))


def hira(layers: int) -> torch.nn.Module:
    return get_peft_model(smollm2(layers), HiraConfig(r=16, target_modules=PROJECTIONS))


def one_mask(x: Any, weight: Any, bias: Any, masks: Any) -> Any:
    return plain_masked_linear(x, weight, bias, masks)


class Method:
    """A model, its optimizer, and how it makes a step.

    Args:
        model: with what is to be trained trainable.
        optimizer: over that.
        plain: use the one-line autograd version of the masked layer.
        last: told before each backward pass whether it is the step's last one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plain: bool = False,
        last: list[bool] | None = None,
    ) -> None:
        self.model, self.optimizer, self.plain = model, optimizer, plain
        self.last = last if last is not None else [True]

    def step(self, batches: Sequence[torch.Tensor]) -> float:
        """One optimizer step over the batches; its seconds."""
        context = mock.patch.object(maskft.tuner.layer, "masked_linear", one_mask) if self.plain else nullcontext()
        started = time.perf_counter()
        with context:
            for place, ids in enumerate(batches):
                self.last[0] = place == len(batches) - 1
                answers = ids.shape[1] // 4  # labels stand on the last quarter, as those of answers do
                logits = self.model(input_ids=ids, logits_to_keep=answers + 1).logits[:, :-1]
                F.cross_entropy(logits.float().flatten(0, 1), ids[:, -answers:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)


def in_mode(name: str, layers: int, *, accumulate: bool = False, **settings: Any) -> Method:
    """S-MFT in a memory mode."""
    model = masked(layers, score_dtype=MODES[name].score_dtype, **settings)
    last = [True]
    optimizer = score_optimizer(model, name, lr=0.05, ready=lambda: last[0])
    if accumulate and name == "fast":
        cache_weights(model, optimizer)
    return Method(model, optimizer, last=last)


def trained(model: torch.nn.Module, lr: float, **settings: Any) -> Method:
    return Method(model, adamw(model, lr), **settings)


METHODS: dict[str, Callable[..., Method]] = {
    "full fine-tuning": lambda layers, **_: trained(full(layers), 1e-5),
    "full fine-tuning, fp32": lambda layers, **_: trained(full(layers, torch.float32), 1e-5),
    "S-MFT plain": lambda layers, **_: trained(masked(layers), 0.05, plain=True),
    "S-MFT fast": lambda layers, **more: in_mode("fast", layers, **more),
    "S-MFT balanced": lambda layers, **more: in_mode("balanced", layers, **more),
    "S-MFT tight": lambda layers, **more: in_mode("tight", layers, **more),
    "S-MFT low-rank r=16": lambda layers, **more: in_mode("fast", layers, score_layout="low-rank", rank=16, **more),
    "LoRA r=16": lambda layers, **_: trained(lora(layers), 1e-3),
    "S-MFT tight, nf4": lambda layers, **more: in_mode("tight", layers, base=in_nf4, **more),
    "QLoRA r=16": lambda layers, **_: trained(lora(layers, in_nf4), 1e-3),
    "HiRA r=16": lambda layers, **_: trained(hira(layers), 1e-3),
}


def provenance() -> dict[str, Any]:
    """Date, versions and machine of a record."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        **{name: metadata.version(name) for name in ("maskft", "torch", "peft", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
