"""A script as users of TRL write it, on one process or launched on several: `script.py SETTINGS`.

SETTINGS is a JSON file with the folders of `bases`, the folder `out` and the number of `processes`. For each base it
writes the adapter, the losses, the logits of the trained model on a batch, and which tensors of masked layers were in
pieces.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

BATCH = 4
WORDS = ["what", "color", "shape", "red", "circle", "yes", "no"]


def rows(images: bool) -> list[dict[str, Any]]:
    """Forty rows of a few words, so that batches are of many lengths."""
    from PIL import Image

    draw = random.Random(0)
    found: list[dict[str, Any]] = []
    for _ in range(40):
        question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(1, most))) for most in (5, 3))
        if not images:
            found.append({"text": f"{question} {answer}"})
            continue
        ask = {"role": "user", "content": question}
        found.append(
            {
                "images": [Image.new("RGB", (28, 28), draw.choice(["red", "blue", "lime"]))],
                "prompt": [ask],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return found


def train(base: Path, out: Path, processes: int, **changes: Any) -> None:
    """Ten steps on as many rows a step as there would be on one process."""
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from maskft import MaskConfig
    from maskft.audit import MaskAudit
    from maskft.tuner import MaskLayer
    from maskft.tuner.sharding import is_sharded

    sees = (base / "processor_config.json").is_file()
    args = SFTConfig(
        output_dir=str(out),
        max_steps=10,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=0.05,
        adam_epsilon=1e-12,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(base, dtype="float32")
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows(sees)),
        processing_class=(AutoProcessor if sees else AutoTokenizer).from_pretrained(base),
        peft_config=MaskConfig(gate="soft"),
        callbacks=[MaskAudit(strict=True)],
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))

    masked = [module for module in trainer.model.modules() if isinstance(module, MaskLayer)]
    pieces = [is_sharded(p) for layer in masked for p in (layer.frozen_parameter(), *layer.parameters_of("default"))]
    batch = {name: tensor for name, tensor in next(iter(trainer.get_train_dataloader())).items() if name != "labels"}
    trainer.model_wrapped.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(**batch).logits
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "pieces.json").write_text(json.dumps(pieces))
        tensors = {**batch, "logits": logits}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "logits.safetensors")


if __name__ == "__main__":
    from tests.distributed.cpu import is_sharding, prepare

    if is_sharding():
        prepare()
    settings = json.loads(Path(sys.argv[1]).read_text())
    for base in map(Path, settings["bases"]):
        train(base, Path(settings["out"]) / base.name, settings["processes"], use_cpu=not is_sharding())
