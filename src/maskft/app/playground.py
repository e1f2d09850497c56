"""One base with several masks in memory, asked about images: the part of the playground that knows no web page.

A mask is worn at a strength s: every gate is 1 + s (m - 1), so 0 is the base and 1 the mask. Layers can be switched
off, which is strength 0 for them. Answers come word by word.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from maskft.adapters import combine
from maskft.audit import masked_layers
from maskft.data import Collator, open_image
from maskft.data.schema import image_part, text_part, turn
from maskft.errors import DataError, UserError
from maskft.evaluation.candidates import Candidate
from maskft.gates import Gate
from maskft.learnt import ADAPTER
from maskft.measures import place
from maskft.tuner import add_saved, attach_saved
from maskft.vlm.load import load_model, load_processor

MOST_PIXELS = 20_000_000
"""Larger images are refused before they are decoded."""
LONGEST_QUESTION = 2000
"""Characters."""
BASE = "base"
MIXTURE = "mixture"


@dataclass(frozen=True)
class Blend:
    """A gate at a strength: 1 + strength (m - 1)."""

    gate: Gate
    strength: float
    identity_at_start = False

    def value(self, offset: Tensor, weight: Tensor) -> Tensor:
        return self.gate.value(offset, weight).sub_(1).mul_(self.strength).add_(1)

    def derivative(self, offset: Tensor, weight: Tensor, value: Tensor | None = None) -> Tensor:
        return self.gate.derivative(offset, weight).mul_(self.strength)


@dataclass(frozen=True)
class _Ranked:
    """Ranking over all layers at a strength."""

    ranking: Any
    strength: float

    def gate(self, layer: Any) -> Blend:
        return Blend(self.ranking.gate(layer), self.strength)


class Playground:
    """A base and its masks.

    Attributes:
        names: of the masks, in order; a mixture comes last once it is made.
        folders: the masks' folders by name.
        places: what can be switched off, "projector" and numbers of layers among them.
    """

    def __init__(self, candidates: Sequence[Candidate], *, dtype: str | None = None, max_new_tokens: int = 64) -> None:
        """Load everything.

        Args:
            candidates: as `maskft.evaluation.candidates.find_candidates` returns them; at least one mask.
            dtype: of the base; default: as its run was trained.
            max_new_tokens: longest answer.

        Raises:
            UserError: there is no mask, or one of them is a projector.
            ModelError, AdapterError: base or mask cannot be loaded.
        """
        masks = [candidate for candidate in candidates if candidate.folder is not None]
        if not masks:
            raise UserError("the playground needs a mask: give a run, or adapters with --adapters.")
        if wrong := [candidate.name for candidate in masks if candidate.learnt != ADAPTER]:
            raise UserError(f"{', '.join(wrong)} trained weights of the base; the playground shows masks.")
        section = candidates[0].model
        self.max_new_tokens = max_new_tokens
        self.processor = load_processor(section.base, trust_remote_code=section.trust_remote_code)
        base = load_model(
            section.base,
            dtype=dtype or section.dtype,
            attention=section.attention,
            trust_remote_code=section.trust_remote_code,
            quantization=section.quantization,
        )
        self._merges = section.quantization == "none"  # a quantised weight would be rounded anew
        self.folders = {mask.name: mask.folder for mask in masks if mask.folder is not None}
        self._adapters: dict[str, str] = {}
        first, *others = self.folders
        self.model = attach_saved(base, self.folders[first]).eval()
        self._adapters[first] = "default"
        for number, name in enumerate(others):
            self._add(name, f"mask{number}")
        layers = (place(name) for name in masked_layers(self.model, "default"))
        found = {str(where.layer) if where.layer >= 0 else where.part for where in layers}
        self.places = sorted(found, key=lambda name: (name.isdigit(), int(name) if name.isdigit() else 0, name))

    @property
    def names(self) -> list[str]:
        """Of the masks, in the order they were given."""
        return list(self._adapters)

    def mix(self, operation: str, first: str, second: str, share: float) -> str:
        """Make a mixture of two masks, in place of an earlier one; return its description.

        Args:
            operation: one of `maskft.adapters.algebra.OPERATIONS`.
            first, second: names of masks.
            share: weight of the second in an interpolation, in [0, 1].

        Raises:
            UserError: the operation does not suit these masks.
            AdapterError: they do not belong together.
        """
        if first == second or not {first, second} <= set(self.folders):
            raise UserError("choose two different masks.")
        weights = [1 - share, share] if operation == "interpolate" else None
        with tempfile.TemporaryDirectory(prefix="maskft-") as scratch:
            folder = Path(scratch) / "mixture"
            made = combine(operation, [self.folders[first], self.folders[second]], folder, weights=weights)
            if MIXTURE in self._adapters:
                self.model.set_adapter(self._adapters[first])
                self.model.delete_adapter(self._adapters.pop(MIXTURE))
            self._add(MIXTURE, MIXTURE, folder)
        clipped = f"; {100 * made.clipped / made.scores:.2g} % of the gates were clipped" if made.clipped else ""
        shares = f" ({1 - share:.2f} and {share:.2f})" if weights else ""
        return f"{operation} of {first} and {second}{shares}{clipped}"

    def answers(
        self, image: str | Path | None, question: str, names: Sequence[str], strength: float, on: Sequence[str]
    ) -> Iterator[dict[str, str]]:
        """What each model says so far, again and again until all have finished; the base comes first.

        Args:
            image: a file; None asks without an image.
            question: the text.
            names: masks to ask beside the base.
            strength: of the masks, in [0, 1].
            on: those of `places` where the masks work.

        Raises:
            UserError: there is no question, it is too long, or a name or strength is not allowed.
            DataError: the image is too large or cannot be read.
        """
        question = question.strip()
        if not question or len(question) > LONGEST_QUESTION:
            raise UserError(f"ask a question of 1 to {LONGEST_QUESTION} characters.")
        if unknown := set(names) - set(self.names):
            raise UserError(f"there is no mask {', '.join(sorted(unknown))}; there are {', '.join(self.names)}.")
        if not 0 <= strength <= 1:
            raise UserError(f"the strength is {strength}; it must lie between 0 and 1.")
        inputs = self._inputs(image, question)
        said: dict[str, str] = {}
        for name in (BASE, *names):
            said[name] = ""
            with self._worn(None if name == BASE else self._adapters[name], strength, set(on)):
                stream = self._stream(inputs)
                with contextlib.closing(stream):
                    for text in stream:
                        said[name] = text
                        yield dict(said)
        yield dict(said)

    def _add(self, name: str, adapter: str, folder: Path | None = None) -> None:
        add_saved(self.model, folder or self.folders[name], adapter)
        self._adapters[name] = adapter

    def _inputs(self, image: str | Path | None, question: str) -> dict[str, Any]:
        pictures, parts = [], [text_part(question)]
        if image is not None:
            check_size(Path(image))
            entry = {"path": str(image), "bytes": None}
            open_image(entry)
            pictures, parts = [entry], [image_part(), text_part(question)]
        row = {"id": "0", "images": pictures, "messages": [turn("user", parts)], "origin": "the question"}
        batch = Collator(self.processor, max_length=None).prompts([row])
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    @contextlib.contextmanager
    def _worn(self, adapter: str | None, strength: float, on: set[str]) -> Iterator[None]:
        """The model with one mask, or none, for the duration of the block."""
        if adapter is None:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(adapter)
        layers = masked_layers(self.model, adapter)
        before = {name: (layer.mask_gate[adapter], layer.mask_ranking.get(adapter)) for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                where = place(name)
                works = (str(where.layer) if where.layer >= 0 else where.part) in on
                gate, ranking = before[name]
                share = strength if works else 0.0
                layer.mask_gate[adapter] = Blend(gate, share)
                if ranking is not None:
                    layer.mask_ranking[adapter] = _Ranked(ranking, share)  # type: ignore[assignment]
            if self._merges:  # once, and not for every word
                self.model.merge_adapter(adapter_names=[adapter])
            yield
        finally:
            if self._merges:
                self.model.unmerge_adapter()
            for name, layer in layers.items():
                gate, ranking = before[name]
                layer.mask_gate[adapter] = gate
                if ranking is not None:
                    layer.mask_ranking[adapter] = ranking

    def _stream(self, inputs: dict[str, Any]) -> Generator[str, None, None]:
        """The answer so far, whenever it has grown. Closing the iterator ends the generation."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = threading.Event(), []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        do_sample=False,
                        max_new_tokens=self.max_new_tokens,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                    )
            except Exception as error:
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text.strip()
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]


class _Stop(StoppingCriteria):
    """Ends a generation whose reader has left."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def check_size(path: Path) -> None:
    """Raise DataError if the file is no image or has too many pixels; nothing is decoded."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"this file is not an image that can be shown ({error}). Give a PNG, JPEG or WebP.") from error
    if width * height > MOST_PIXELS:
        raise DataError(
            f"this image has {width} x {height} pixels; at most {MOST_PIXELS:,} are allowed. Scale it down first."
        )
