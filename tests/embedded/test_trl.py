"""Real weights, TRL's own trainer, one changed config object."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from maskft import MaskConfig
from maskft.tuner import MaskLayer
from maskft.vlm.embedded import embedded_base

STEPS = 20
QUESTIONS = {
    "What has wheels?": "A car.",
    "What has leaves?": "A tree.",
    "What has wings?": "A bird.",
    "What barks?": "A dog.",
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder of its own, taken out of the embedded base."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    whole = AutoModelForImageTextToText.from_pretrained(embedded_base(), dtype=torch.float32)
    model = LlamaForCausalLM(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_base()).save_pretrained(folder)
    return folder


def test_twenty_steps_of_sfttrainer_saved_and_reloaded(language_model: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in QUESTIONS.items()
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        adam_epsilon=1e-12,
        max_length=64,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
    )
    base = LlamaForCausalLM.from_pretrained(language_model, dtype=torch.bfloat16)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = SFTTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=MaskConfig(gate="soft"),
        processing_class=AutoTokenizer.from_pretrained(language_model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])

    tuned = trainer.model.eval()
    layers = [module for module in tuned.modules() if isinstance(module, MaskLayer)]
    assert len(layers) == 7 * 30
    for layer in layers:
        assert layer.mask_scores["default"].dtype == torch.float32
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.tensor([[1, 420, 3299, 253, 1057, 47]])
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        with tuned.disable_adapter():
            untouched = tuned(input_ids=ids).logits
    fresh = LlamaForCausalLM.from_pretrained(language_model, dtype=torch.bfloat16).eval()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in fresh.state_dict().items())
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, untouched)
        reloaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.equal(reloaded(input_ids=ids).logits, expected)
    assert not torch.equal(expected, untouched)
