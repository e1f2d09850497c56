"""TRL's SFTTrainer with a progress bar on stderr, the log on disk, and a loss that a CPU can afford."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from maskft.audit import MaskAudit
from maskft.data import IGNORED, Collator
from maskft.guard import GuardedTrainer
from maskft.learnt import TRAINED, overwrite
from maskft.mask_stats import MaskStatistics
from maskft.memory import cache_weights, fuse_steps, keep_inputs_frozen, memory_mode, use_kernels
from maskft.optim import ScoreAdamW
from maskft.runs import write_json
from maskft.sharded import ShardedTrainer
from maskft.stepping import StepInBackward
from maskft.tuner import kept_scores


def make_trainer(
    model: Any,
    arguments: Any,
    *,
    collator: Collator,
    processor: Any,
    parts: Mapping[str, Any],
    log: Path,
    audit: MaskAudit,
    memory: str | None = None,
    projector_rate: float | None = None,
    shares: Any = None,
) -> SFTTrainer:
    """A trainer over `parts["train"]`, evaluating on `parts["validation"]` where the arguments ask for it.

    `memory` is a mode of `maskft.memory` for the scores; None where the model has none. `projector_rate` is the
    learning rate of a projector that is trained whole beside an adapter. `shares` hold the base's values where the
    model has none yet, see `maskft.sharded`.
    """
    reentrant = (arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if not reentrant and arguments.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        keep_inputs_frozen(model)
    gates = MaskStatistics(log.with_name("mask_stats.json"), write_json)
    with kept_scores(model):
        trainer = LabelledPositionsTrainer(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=parts["train"],
            eval_dataset=parts.get("validation") if arguments.eval_strategy != "no" else None,
            processing_class=processor,
            callbacks=[Watch(log), audit, gates],
            optimizer_cls_and_kwargs=_optimizer(model, arguments, memory),
        )
    trainer.audit, trainer.memory, trainer.projector_rate, trainer.shares = audit, memory, projector_rate, shares
    gates.trackers = trainer.callback_handler
    if memory and trainer.accelerator.distributed_type in _WHOLE:
        use_kernels(model)
    _name_layers(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


def _name_layers(trainer: SFTTrainer) -> None:
    """Name the classes of layers that FSDP takes to pieces one by one, where the launch names none.

    Transformers' own list for a model also has classes of other models of its family, which accelerate refuses.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in trainer.model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(there & set(trainer.model._no_split_modules or ()))


def _optimizer(
    model: Any, arguments: Any, memory: str | None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """`ScoreAdamW` where scores are in bf16, which small steps would not move otherwise, or where the recipe names no
    optimizer and the whole model is here; else Trainer's own choice."""
    bf16 = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    whole = memory and arguments.distributed_state.distributed_type in _WHOLE
    if not bf16 and not (whole and arguments.optim == "adamw_torch_fused" and not arguments.optim_args):
        return None
    return ScoreAdamW, {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "moments": memory_mode(memory).moments if memory else "float32",
    }


_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways to train in which each process has the whole model."""


class LabelledPositionsTrainer(GuardedTrainer, ShardedTrainer, SFTTrainer):
    """SFTTrainer whose loss on a CPU computes logits only where there is a label.

    There, TRL's own loss projects every position on the whole vocabulary in fp32, which is half of a step of a small
    model. Elsewhere, and for losses other than the plain one, TRL's code runs.

    Scores are updated inside the backward pass where their memory mode says so and one process trains.

    Attributes:
        audit: told the loss of the first batch and the base's on it, where the gates don't start at 1.
        memory: the scores' memory mode, if any.
        projector_rate: learning rate of modules that are trained whole beside an adapter.
        in_backward: makes the optimizer's steps, where that is done inside the backward pass.
    """

    audit: MaskAudit
    memory: str | None = None
    projector_rate: float | None = None
    in_backward: StepInBackward | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.projector_rate is not None:
            _set_rate(optimizer, self.model, self.projector_rate)
        self.keep_order(optimizer)
        if not self.memory or self.accelerator.distributed_type not in _WHOLE:
            return optimizer
        if self.memory == "fast" and self.args.gradient_accumulation_steps > 1:
            cache_weights(self.model, optimizer)
        alone = self.accelerator.distributed_type == DistributedType.NO and not self.args.fp16  # fp16 scales gradients
        if memory_mode(self.memory).step_in_backward and alone and self.in_backward is None:
            state = self.accelerator.gradient_state
            self.in_backward = StepInBackward(
                optimizer, self.args.max_grad_norm, lambda: bool(state.sync_gradients), self.audit.see_gradient
            )
            fuse_steps(self.model, self.in_backward)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As Trainer's; of a model without adapter only what is trained, by the names it has here.

        Transformers saves some models by other names than those that it looks for when training goes on.
        """
        if hasattr(self.model, "peft_config") or self.accelerator.distributed_type not in _WHOLE:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / TRAINED
        if file.is_file():
            overwrite(self.model, load_file(file))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        file = Path(self.state.best_model_checkpoint) / TRAINED
        if file.is_file():
            overwrite(self.model, load_file(file))
        else:
            super()._load_best_model()

    def _clip_grad_norm(self, model: Any) -> Any:
        """The norm of the gradients that were used in the backward pass, each clipped there; else as Trainer's."""
        return super()._clip_grad_norm(model) if self.in_backward is None else self.in_backward.norm()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.in_backward is not None:
            return self.in_backward.norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == 0 and self.audit.wants_base_loss(model):
            self.audit.first_batch(model, self._prepare_inputs(inputs), labelled_loss)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        plain = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs["labels"].device.type != "cpu" or not plain:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.in_backward is not None:
                self.require_number(loss)
            return loss
        loss = labelled_loss(model, inputs, num_items_in_batch)
        self.require_number(loss)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which the averaging of gradients divides by
        return loss


def _set_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float) -> None:
    """Give parameters of modules that are trained whole beside an adapter a learning rate of their own."""
    whole = {p for name, p in model.named_parameters() if ".modules_to_save." in name and p.requires_grad}
    for group in list(optimizer.param_groups):
        if moved := [p for p in group["params"] if p in whole]:
            group["params"] = [p for p in group["params"] if p not in whole]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def labelled_loss(model: Any, inputs: Mapping[str, Any], items: Any = None) -> Tensor:
    """Negative log-likelihood of the labels, in nats, summed and divided by `items` (default: their number).

    Logits are computed in the columns (positions) where any row of the batch has a label.
    """
    labels = inputs["labels"][:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, logits_to_keep=columns, use_cache=False).logits
    kept = labels[:, columns]
    total = F.cross_entropy(logits.float().flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / torch.as_tensor((kept != IGNORED).sum() if items is None else items).clamp(min=1)


class Watch(TrainerCallback):
    """A progress bar on stderr, and the log on disk as it grows; of several processes, by the first."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        quiet = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, disable=quiet)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(self.log, state.log_history)
        if logs and "loss" in logs and self.bar is not None:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
