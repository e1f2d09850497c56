"""Saved adapters: read one tensor at a time, and packed into few bits or written in full again.

`pack` never changes the folder it reads. What it writes appears only once it is complete:

    adapter_model.safetensors   the scores as `storage` says; dense ones alone are packed, other layouts are small
    adapter_config.json         as it was, but for `storage`
    README.md                   as it was
    scores.safetensors          the scores in full, where they are to be kept

Packing a folder that has scores.safetensors starts from those.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskft.errors import AdapterError, UserError, gathered
from maskft.folders import refuse_existing, staged
from maskft.gates import Gate
from maskft.linear import Mask
from maskft.packing import Parts, pack_bits, packed_shape, unpack
from maskft.tuner import MaskConfig, attach_saved
from maskft.tuner.attach import unreadable
from maskft.tuner.packed import mask_offsets, pack_mask, pack_offsets, split_part
from maskft.tuner.settings import CONFIG, WEIGHTS, read_settings

SCORES = "scores.safetensors"
"""Scores in full, beside packed ones."""
_SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SavedAdapter:
    """An open adapter folder.

    Attributes:
        folder: where it is.
        settings: the content of its configuration file.
        config: the same, as the tuner knows it.
        weights: the file that is read.
        scores: tensors that scores are made of, by the scores' name: {"": tensor name} where they are in full, else
            by part (`maskft.packing`).
        others: names of all other tensors.
    """

    def __init__(self, folder: Path, *, full: bool = False) -> None:
        """Open a folder.

        Args:
            folder: an adapter's.
            full: read the scores in full that are kept beside packed ones, where there are any.

        Raises:
            AdapterError: a file is missing or damaged, or the adapter is of another method.
            UserError: the configuration has a value that is not allowed.
        """
        self.folder = folder
        self.settings = read_settings(folder)
        try:
            self.config: MaskConfig = MaskConfig.from_pretrained(str(folder))
        except UserError:
            raise
        except (TypeError, ValueError) as error:  # PEFT's own complaints
            raise AdapterError(f"{folder / CONFIG} cannot be used: {error}") from error
        self.weights = folder / (SCORES if full and (folder / SCORES).is_file() else WEIGHTS)
        try:
            self._file = _opened(self.weights)
            names = sorted(self._file.keys())
        except SafetensorError as error:
            raise unreadable(self.weights, error) from error
        self.scores: dict[str, dict[str, str]] = {}
        self.others: list[str] = []
        for name in names:
            score, part = split_part(name)
            if part is None and score.rpartition(".")[2] not in ("mask_scores", "mask_left", "mask_right"):
                self.others.append(name)
            else:
                self.scores.setdefault(score, {})[part or ""] = name

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file."""
        found: Tensor = self._file.get_tensor(name)
        return found

    def shape(self, score: str) -> torch.Size:
        """Shape of the scores of one name.

        Raises:
            AdapterError: they are packed, and a part has a flaw.
        """
        names = self.scores[score]
        if set(names) == {""}:
            return torch.Size(self._file.get_slice(names[""]).get_shape())
        return packed_shape(self.parts(score))

    def parts(self, score: str) -> Parts:
        """The tensors that packed scores are made of, by part."""
        return {part: self.tensor(name) for part, name in self.scores[score].items()}

    def packed(self, score: str) -> bool:
        """Whether scores are packed."""
        return "" not in self.scores[score]

    def read(self, score: str) -> Tensor:
        """The scores of one name: a boolean mask where that was saved, else what the layout makes offsets of.

        Raises:
            AdapterError: they have a flaw.
        """
        parts = self.parts(score)
        if set(parts) != {""}:
            return unpack(parts)
        scores = parts[""]
        if scores.dim() < 2 or not scores.numel():
            raise AdapterError(f"has the shape {tuple(scores.shape)}, which no layer's scores have")
        if scores.dtype not in _SCORE_DTYPES or not torch.isfinite(scores).all():
            raise AdapterError("has values that are not finite numbers")
        return scores


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


@dataclass(frozen=True)
class Packed:
    """What packing gave.

    Attributes:
        scores: how many scores the adapter has; with dense ones, the masked weights.
        bytes_before: size of the file of tensors that was read.
        bytes_after: size of the one written.
        bits_per_score: of the one written, headers included.
        gate_error_rms: root mean square of the change of m; None for hard gates, whose masks don't change, and for
            gates of a user's own.
        gate_error_max: the largest change of m, likewise.
    """

    scores: int
    bytes_before: int
    bytes_after: int
    bits_per_score: float
    gate_error_rms: float | None
    gate_error_max: float | None


def pack(
    folder: Path,
    out: Path,
    storage: str = "int4",
    *,
    keep_scores: bool = False,
    forget_base: bool = False,
    model: Any = None,
    beside: Mapping[str, str] | None = None,
) -> Packed:
    """Write a saved adapter with its dense scores in another form.

    Args:
        folder: the adapter's.
        out: new or empty folder; it appears only once it is complete.
        storage: "float32", "int8" or "int4" (soft gates), "bits" (hard gates).
        keep_scores: also keep the scores in full, as scores.safetensors.
        forget_base: leave the base's fingerprint out, so that the adapter loads on any base with such layers.
        model: the base. Needed, and wrapped, to turn "topk" scores into bits: that mask depends on its weights.
        beside: more text files to put into `out`, by name.

    Raises:
        RunError: `out` exists and is not empty.
        UserError: the adapter's gate cannot be stored so.
        AdapterError: the adapter is damaged, has no scores in full to keep, or needs `model`.
    """
    refuse_existing(out)
    source = SavedAdapter(folder, full=True)
    config = replace(source.config, storage=storage)
    if keep_scores and any(source.packed(score) for score in source.scores):
        raise AdapterError(f"{folder} is packed already: it has no scores in full to keep.")
    masks = needs_base(source, storage)
    if masks and model is None:
        raise AdapterError("a topk mask depends on the base's weights, so turning it into bits needs the base.")
    tensors, errors = ({}, _Errors()) if masks else _converted(source, config)
    fingerprint = None if forget_base else source.settings.get("base_fingerprint")
    settings = {**source.settings, "storage": storage, "base_fingerprint": fingerprint}
    with staged(out) as staging:
        if masks:
            attached = attach_saved(model, folder)
            attached.peft_config["default"].storage = storage
            attached.save_pretrained(staging, save_embedding_layers=False)
            (staging / CONFIG).write_text(_json(settings), encoding="utf-8")
        else:
            write_adapter(staging, tensors, settings)
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", staging / "README.md")
        if keep_scores:
            shutil.copyfile(source.weights, staging / SCORES)
        for name, text in (beside or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
    scores = sum(source.shape(score).numel() for score in source.scores)
    after = (out / WEIGHTS).stat().st_size
    return Packed(
        scores, source.weights.stat().st_size, after, 8 * after / max(scores, 1), errors.rms(), errors.largest()
    )


def needs_base(source: SavedAdapter, storage: str) -> bool:
    """Whether `pack` has to know the base's weights for this."""
    dense = any(score.endswith(".mask_scores") and not source.packed(score) for score in source.scores)
    return storage == "bits" and source.config.gate == "topk" and source.config.score_layout == "dense" and dense


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write an adapter's two files into `folder`."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(_json(settings), encoding="utf-8")


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True)


class _Errors:
    """Changes of the gate's value, summed up."""

    def __init__(self) -> None:
        self.count, self.squares, self.most = 0, 0.0, 0.0

    def add(self, gate: Gate, before: Tensor, after: Tensor) -> None:
        change = gate.value(after, after).sub_(gate.value(before, before))
        self.count += change.numel()
        self.squares += change.square().sum(dtype=torch.float64).item()
        self.most = max(self.most, change.abs().max().item())

    def rms(self) -> float | None:
        return math.sqrt(self.squares / self.count) if self.count else None

    def largest(self) -> float | None:
        return self.most if self.count else None


def _converted(source: SavedAdapter, config: MaskConfig) -> tuple[dict[str, Tensor], _Errors]:
    """The adapter's tensors in the form of `config.storage`, and by how much the gates change."""
    tensors = {name: source.tensor(name) for name in source.others}
    errors, problems = _Errors(), []
    for score in source.scores:
        try:
            before = source.read(score)
            parts = _parts(before, config) if config.score_layout == "dense" else {"": before}
            tensors.update({f"{score}.{part}" if part else score: tensor for part, tensor in parts.items()})
            if config.score_layout == "dense" and config.gate in ("soft", "normalized", "centered"):
                errors.add(config.make_gate(), before.float(), parts[""].float() if "" in parts else unpack(parts))
        except AdapterError as error:
            problems.append(f"{score} {error}")
    if problems:
        raise AdapterError(f"{source.weights} has flaws:\n{gathered(problems)}")
    return tensors, errors


def _parts(found: Tensor, config: MaskConfig) -> Parts:
    """Dense scores or a mask in the form of `config.storage`; by the name "" where that is one tensor in full."""
    mask = found.dtype == torch.bool
    if config.storage == "float32":
        return {"": mask_offsets(found, config.gate) if mask else found}
    if config.storage == "bits":
        return pack_bits(found) if mask else pack_mask(Mask(config.make_gate(), (found,)), found)
    return pack_offsets(mask_offsets(found, config.gate) if mask else found, config.storage)
