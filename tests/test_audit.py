"""The audit: each failure it knows is provoked once, and a healthy run has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from maskft import MaskConfig
from maskft.audit import MaskAudit, collapse_finding, flipped_share, gradient_findings, score_findings, start_findings
from maskft.errors import AuditError

from .tuner.models import batch, loss, scatter, scores_of, tiny_llama, tiny_llava


def masked(**fields: Any) -> nn.Module:
    """A tiny Llama with six layers and a mask at its start."""
    return get_peft_model(tiny_llama(num_hidden_layers=6), MaskConfig(**fields))


def kinds(findings: Any) -> list[str]:
    return [finding.kind for finding in findings]


def train(model: nn.Module, folder: Path, audit: MaskAudit, **arguments: Any) -> None:
    rows = {name: tensor[:1].expand(8, -1).tolist() for name, tensor in batch(model).items()}
    data = Dataset.from_dict({**rows, "labels": rows["input_ids"]})
    settings = {"max_steps": 2, "learning_rate": 0.05, "adam_epsilon": 1e-12, "use_cpu": True, **arguments}
    training = TrainingArguments(output_dir=str(folder), report_to="none", save_strategy="no", **settings)
    Trainer(model, training, train_dataset=data, callbacks=[audit]).train()


class TestBeforeTraining:
    def test_a_start_far_from_one(self) -> None:
        config = MaskConfig(gate="soft", init_gate=0.5)
        (finding,) = start_findings(get_peft_model(tiny_llama(), config), "default", config)
        assert finding.kind == "far-start"
        assert "starts at 0.5" in finding.message
        assert "init_gate to 0.9 or more" in finding.message

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [("all", []), ("middle-third", []), ("first-third", ["shallow"]), ("last-third", ["deep"]), ([0, 5], [])],
    )
    def test_shallow_or_deep_layers_alone(self, layers: Any, expected: list[str]) -> None:
        config = MaskConfig(layers=layers)
        assert kinds(start_findings(masked(layers=layers), "default", config)) == expected

    def test_names_the_layers(self) -> None:
        config = MaskConfig(layers="last-third")
        (finding,) = start_findings(masked(layers="last-third"), "default", config)
        assert "only layers 4 to 5 of the language model's 6" in finding.message

    def test_stacks_are_told_apart(self) -> None:
        config = MaskConfig(scope=["language", "projector"])
        assert kinds(start_findings(get_peft_model(tiny_llava(), config), "default", config)) == []


class TestGradients:
    def test_healthy(self) -> None:
        model = masked()
        loss(model).backward()
        assert kinds(gradient_findings(model, "default", 1e-12)) == []

    def test_a_mask_without_gradient_is_named(self) -> None:
        model = masked()
        loss(model).backward()
        name, parameter = next(iter(scores_of(model).items()))
        parameter.grad = None
        (finding,) = gradient_findings(model, "default", None)
        assert finding.kind == "no-gradient"
        assert name.removesuffix(".mask_scores.default") in finding.message
        parameter.grad = torch.zeros_like(parameter)
        assert kinds(gradient_findings(model, "default", None)) == ["no-gradient"]

    def test_not_finite(self) -> None:
        model = masked()
        loss(model).backward()
        next(iter(scores_of(model).values())).grad[0, 0] = float("nan")
        assert kinds(gradient_findings(model, "default", None)) == ["not-finite"]

    def test_below_adam_s_epsilon(self) -> None:
        model = masked(init_gate=0.98)
        loss(model).backward()
        (finding,) = gradient_findings(model, "default", 1e3)
        assert finding.kind == "vanishing"
        assert "adam_epsilon" in finding.message


class TestScores:
    @pytest.mark.parametrize("gate", ["soft", "normalized", "centered"])
    @pytest.mark.parametrize("end", [-50.0, 50.0])
    def test_saturated(self, gate: str, end: float) -> None:
        model = masked(gate=gate)
        assert kinds(score_findings(model, "default")) == []
        for parameter in scores_of(model).values():
            parameter.data.fill_(end)
        (finding,) = score_findings(model, "default")
        assert finding.kind == "saturated"
        assert "42 masks" in finding.message
        assert "and 32 more" in finding.message

    @pytest.mark.parametrize("gate", ["topk", "threshold"])
    def test_hard_gates_are_never_saturated(self, gate: str) -> None:
        model = masked(gate=gate)
        scatter(model, std=100)
        assert kinds(score_findings(model, "default")) == []

    def test_not_finite(self) -> None:
        model = masked()
        next(iter(scores_of(model).values())).data[0, 0] = float("inf")
        assert kinds(score_findings(model, "default")) == ["not-finite"]

    def test_flipped_share(self) -> None:
        model = masked(gate="threshold")
        assert flipped_share(model, "default") == 0
        for parameter in scores_of(model).values():
            parameter.data[: len(parameter) // 2] = -100
        assert flipped_share(model, "default") == pytest.approx(0.5)
        assert flipped_share(masked(gate="soft"), "default") is None


class TestCollapse:
    def test_a_little_worse_is_no_finding(self) -> None:
        assert kinds(collapse_finding(3.0, 2.0, MaskConfig())) == []

    @pytest.mark.parametrize(
        ("fields", "advice"),
        [
            ({"gate": "topk", "keep_ratio": 0.2}, "keep_ratio is 0.2"),
            ({"gate": "soft", "init_gate": 0.3}, "init_gate is 0.3"),
        ],
    )
    def test_says_what_to_change(self, fields: dict[str, Any], advice: str) -> None:
        (finding,) = collapse_finding(9.0, 2.0, MaskConfig(**fields))
        assert finding.kind == "collapsed"
        assert advice in finding.message
        assert kinds(collapse_finding(float("nan"), 2.0, MaskConfig(**fields))) == ["collapsed"]

    def test_the_first_batch_is_compared_with_the_base(self) -> None:
        torch.manual_seed(3)
        audit, model = MaskAudit(), masked(gate="soft", init_gate=0.01)
        before = torch.get_rng_state()
        assert audit.wants_base_loss(model)
        audit.first_batch(model, {}, lambda bare, _: torch.tensor(9.0 if not disabled(bare) else 1.0))
        assert kinds(audit.findings) == ["collapsed"]
        assert torch.equal(torch.get_rng_state(), before)
        assert not audit.wants_base_loss(model)
        assert not disabled(model)

    def test_gates_that_start_at_one_need_no_comparison(self) -> None:
        assert not MaskAudit().wants_base_loss(masked(gate="normalized"))
        off = masked(gate="normalized")
        scatter(off)
        assert MaskAudit().wants_base_loss(off)


def disabled(model: Any) -> bool:
    return next(module.disable_adapters for module in model.modules() if hasattr(module, "mask_gate"))


class TestCallback:
    def test_a_healthy_run_has_no_findings(self, tmp_path: Path) -> None:
        audit = MaskAudit(strict=True)
        train(masked(), tmp_path, audit)
        assert audit.findings == []

    def test_warns_and_goes_on(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        audit = MaskAudit()
        train(masked(layers="first-third", gate="soft", init_gate=0.5), tmp_path, audit)
        assert kinds(audit.findings) == ["far-start", "shallow"]
        assert "audit: the soft gate starts at 0.5" in caplog.text

    def test_strict_stops_before_the_first_step(self, tmp_path: Path) -> None:
        model = masked(layers="first-third")
        with pytest.raises(AuditError, match="only layers 0 to 1 of the language model's 6"):
            train(model, tmp_path, MaskAudit(strict=True))
        assert not any(parameter.any() for parameter in scores_of(model).values())

    def test_a_dead_mask_is_found_in_the_first_step(self, tmp_path: Path) -> None:
        model = get_peft_model(tiny_llava(), MaskConfig(scope=["language", "vision"]))
        with pytest.raises(AuditError, match=r"masks got no gradient(.|\n)*vision"):
            train_text_only(model, tmp_path)

    def test_a_learning_rate_of_zero_does_not_move_the_mask(self, tmp_path: Path) -> None:
        audit = MaskAudit()
        train(masked(), tmp_path, audit, learning_rate=0.0)
        assert kinds(audit.findings) == ["unmoved"]
        assert "no score has changed in 2 steps" in audit.findings[0].message

    def test_scores_that_flip_nothing(self, tmp_path: Path) -> None:
        audit = MaskAudit()
        train(masked(gate="threshold"), tmp_path, audit, learning_rate=1e-3)
        assert kinds(audit.findings) == ["unmoved"]
        assert "no entry of the mask has flipped" in audit.findings[0].message

    def test_too_large_a_step_saturates(self, tmp_path: Path) -> None:
        audit = MaskAudit()
        train(masked(gate="centered"), tmp_path, audit, learning_rate=100.0)
        assert "saturated" in kinds(audit.findings)

    def test_other_methods_are_left_alone(self, tmp_path: Path) -> None:
        from peft import LoraConfig

        audit = MaskAudit(strict=True)
        train(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path, audit)
        train(tiny_llama(), tmp_path, audit)  # no adapter at all
        assert audit.findings == []


def train_text_only(model: nn.Module, folder: Path) -> None:
    ids = [[3, 4, 5, 6]] * 4
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", save_strategy="no", max_steps=1, use_cpu=True, learning_rate=0.1
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[MaskAudit(strict=True)]).train()
