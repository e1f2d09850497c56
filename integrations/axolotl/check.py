"""The plugin in Axolotl itself, on a tiny random model: python integrations/axolotl/check.py

Registers it as `plugins:` does, merges and validates its part of the configuration, and loads the adapter by the
function that Axolotl's model loader calls. Run by hand where Axolotl is installed.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.dict import DictDefault
from transformers import LlamaConfig, LlamaForCausalLM


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **sizes))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    manager = PluginManager.get_instance()
    manager.register("maskft_axolotl.MaskPlugin")
    assert manager.supports_adapter("mask")
    _, schema = merge_input_args()
    given = {
        "base_model": "tiny",
        "adapter": "mask",
        "mask": {"gate": "soft", "modules": "both"},
        "datasets": [{"path": "rows.json", "type": "alpaca"}],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.1,
    }
    cfg = DictDefault(schema(**given).model_dump(exclude_none=True))
    model, config = load_adapter(tiny(), cfg, cfg.adapter)
    assert config.gate == "soft"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 14, len(trained)
    optimizer = torch.optim.AdamW(trained, lr=0.1, eps=1e-12, weight_decay=0.0)
    ids = torch.arange(32).reshape(2, 16)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        cfg.lora_model_dir = folder
        again, _ = load_adapter(tiny(), cfg, cfg.adapter, inference=True)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    versions = ", ".join(f"{name} {version(name)}" for name in ("axolotl", "peft", "transformers", "torch"))
    sys.stdout.write(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 20 steps; saved and loaded alike\n{versions}\n")


if __name__ == "__main__":
    main()
