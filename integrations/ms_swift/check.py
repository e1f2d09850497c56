"""The plugin in ms-swift itself, on a tiny random model: python integrations/ms_swift/check.py

Imports the file as `--external_plugins` does, puts masks on and loads them again by the functions that `swift sft` and
`swift infer` call, and takes a few steps. Run by hand where ms-swift is installed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from swift.pipelines.train.tuner import TunerMixin
from swift.pipelines.utils import prepare_adapter
from swift.tuner_plugin import tuners_map
from swift.utils import import_external_file
from transformers import LlamaConfig, LlamaForCausalLM


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **sizes))


def main() -> None:
    os.environ["MASKFT"] = '{"gate": "soft", "modules": "both"}'
    import_external_file(str(Path(__file__).with_name("maskft_swift.py")))
    asked = {
        "use_liger_kernel": False,
        "is_adapter": True,
        "tuner_backend": "peft",
        "tuner_type": "mask",
        "resume_from_checkpoint": None,
        "adapters": [],
        "use_galore": False,
        "task_type": "causal_lm",
    }
    args = SimpleNamespace(**asked)
    model = TunerMixin.prepare_model(args, tiny())
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
        tuners_map["mask"].save_pretrained(model, folder, safe_serialization=True)
        tuned = model(input_ids=ids).logits
        args.adapters = [folder]
        for again in (prepare_adapter(args, tiny()), TunerMixin.prepare_model(args, tiny())):
            assert torch.equal(again(input_ids=ids).logits, tuned)
    versions = ", ".join(f"{name} {version(name)}" for name in ("ms-swift", "peft", "transformers", "torch"))
    sys.stdout.write(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 20 steps; saved and loaded alike\n{versions}\n")


if __name__ == "__main__":
    main()
