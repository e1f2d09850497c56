"""A base with its mask as a model of lmms-eval, so that lmms-eval's tasks run with it.

pip install 'maskft[lmms-eval]'
lmms-eval --model maskft --model_args pretrained=runs/demo --tasks mmbench_en_dev --batch_size 8

`pretrained` is a run, an adapter's folder or a Transformers model. Images stand in front of the question, or where the
task's text marks them, and are opened as in training. Importing this module needs lmms-eval.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from maskft.data import Collator
from maskft.data.schema import IMAGE_MARKER, image_part, text_part, turn
from maskft.errors import MissingExtraError, UserError
from maskft.evaluation.candidates import Candidate, find_candidate
from maskft.learnt import put_on
from maskft.vlm.load import load_model, load_processor

INSTALL = "pip install 'maskft[lmms-eval]'"


def _part_of_lmms_eval(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"lmms_eval.{module}"), name)
    except ImportError as error:
        raise MissingExtraError(str(error.name or "lmms-eval"), INSTALL, "The adapter for lmms-eval") from error


_Lmms: Any = _part_of_lmms_eval("api.model", "lmms")


def manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` asks for: the name `maskft` and its class."""
    make = _part_of_lmms_eval("models.registry_v2", "ModelManifest")
    return make(model_id="maskft", simple_class_path=f"{__name__}.{MaskedModel.__name__}")


class MaskedModel(_Lmms):  # type: ignore[misc]
    """A model of lmms-eval; its requests' arguments are those of lmms-eval's simple models."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        device: str | None = None,
        max_batch_size: int | str | None = None,
    ) -> None:
        """Load base and mask.

        Args:
            pretrained: as `maskft evaluate` takes it.
            batch_size: questions generated together.
            dtype: of the base, "float32", "bfloat16" or "float16"; default: the run's, else bfloat16.
            device: default: this process's accelerator where there is one.
            max_batch_size: given by lmms-eval; not used.

        Raises:
            UserError: there is no such model, or a value is of the wrong kind.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size}; it must be a whole number above 0.")
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(f"dtype is {dtype}; it must be float32, bfloat16 or float16.")
        candidate = find_candidate(pretrained)
        section = candidate.model if dtype is None else candidate.model.model_copy(update={"dtype": dtype})
        self.batch_size = int(batch_size)
        self.device = torch.device(device or PartialState().device)
        self.processor = load_processor(section.base, trust_remote_code=section.trust_remote_code)
        self._collator = Collator(self.processor)
        base = load_model(
            section.base,
            dtype=section.dtype,
            attention=section.attention,
            trust_remote_code=section.trust_remote_code,
            quantization=section.quantization,
        )
        self.model = _with_learnt(base, candidate)
        if section.quantization == "none":  # a quantised model is put where it belongs when it is loaded
            self.model.to(self.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of `requests`, whose args are (context, settings, visuals of a document, its id, task,
        split). Requests with equal settings share a batch."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                rows = []
                for number in batch:
                    context, settings, visuals, *document = requests[number].args
                    rows.append(_row(context, visuals(self._document(*document))))
                for number, answer in zip(batch, self._generate(rows, settings), strict=True):
                    answers[number] = answer
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request. Its args hold, after the visuals, the function that makes the next
        round: from the document and the answers so far, (visuals, context, done, answers, what it wants back)."""
        results = []
        for request in requests:
            context, settings, visuals, next_round, *place = request.args
            document = self._document(*place)
            seen, info = visuals(document), None
            answers: list[str] = []
            while True:
                answers = [*answers, *self._generate([_row(context, seen)], settings)]
                seen, context, done, answers, info = next_round(
                    document, previous_output=answers, round_idx=len(answers), previous_round_info=info
                )
                if done:
                    break
            results.append(list(answers))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(loss, greedy) of each request's continuation as the answer, args being (context, continuation or a function
        that makes it of the document, visuals of a document, its id, task, split).

        The loss is the mean negative log-likelihood of the continuation's tokens in nats, which is what lmms-eval's
        tasks take: they choose the smallest. Space around a continuation is dropped; the end of turn isn't counted.
        """
        results = []
        for request in requests:
            context, target, visuals, *place = request.args
            document = self._document(*place)
            text = target if isinstance(target, str) else str(target(document))
            results.append(self._loss(_row(context, visuals(document)), text.strip()))
        return results

    def _document(self, number: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _generate(self, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
        inputs = {name: tensor.to(self.device) for name, tensor in self._collator.prompts(rows).items()}
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **_decoding(settings))
        new = tokens[:, inputs["input_ids"].shape[1] :]
        ends = settings.get("until") or []
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [_cut(text, [ends] if isinstance(ends, str) else ends) for text in texts]

    def _loss(self, row: Mapping[str, Any], continuation: str) -> tuple[float, bool]:
        ids = self.processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"lmms-eval asks for the likelihood of an answer without text: {continuation!r}.")
        answer = torch.tensor([ids])
        prompt = self._collator.prompts([row])
        shape = prompt["input_ids"].shape
        tails = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        inputs = {
            name: torch.cat([tensor, tails.get(name, torch.zeros_like(answer)).to(tensor)], dim=1)
            if tensor.shape == shape
            else tensor
            for name, tensor in prompt.items()
        }
        with torch.inference_mode():
            logits = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).logits
        scores = logits[0, -len(ids) - 1 : -1].float().cpu()
        loss = torch.nn.functional.cross_entropy(scores, answer[0])
        return loss.item(), bool((scores.argmax(-1) == answer[0]).all())


def _with_learnt(base: Any, candidate: Candidate) -> Any:
    """The base with what the candidate learnt, for good."""
    if candidate.folder is None:
        return base
    return put_on(base, candidate.folder, candidate.learnt)[0]


def _decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's generation settings `generate` takes; a temperature above 0 means sampling."""
    chosen = {"max_new_tokens": settings.get("max_new_tokens", 1024), "num_beams": settings.get("num_beams", 1)}
    if (settings.get("temperature") or 0) > 0:
        sampling = {
            name: settings[name] for name in ("temperature", "top_p", "top_k") if settings.get(name) is not None
        }
        return {**chosen, "do_sample": True, **sampling}
    return {**chosen, "do_sample": False}


def _cut(text: str, ends: Sequence[str]) -> str:
    """The text, without space around it, up to the first of `ends`."""
    text = text.strip()
    return text[: min([found for end in ends if end and (found := text.find(end)) >= 0], default=len(text))].strip()


def _row(context: str, visuals: Sequence[Any] | None) -> dict[str, Any]:
    """A canonical row that asks `context` about the pictures.

    Raises:
        UserError: a visual is no picture.
    """
    images = [_image(visual) for visual in visuals or []]
    pieces = context.split(IMAGE_MARKER)
    if images and len(pieces) - 1 == len(images):
        parts = list(_interleaved(pieces))
    else:
        parts = [*(image_part() for _ in images), text_part("".join(pieces).strip())]
    return {"id": "lmms-eval", "images": images, "messages": [turn("user", parts)], "origin": "a document of lmms-eval"}


def _interleaved(pieces: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(pieces):
        if number:
            yield image_part()
        if piece.strip():
            yield text_part(piece.strip("\n"))


def _image(visual: Any) -> dict[str, Any]:
    """An entry of a row's images. Pictures in memory are kept as PNG, which loses nothing."""
    if isinstance(visual, Image.Image):
        mode = visual.mode if visual.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "RGB"
        content = io.BytesIO()
        visual.convert(mode).save(content, "PNG")
        return {"path": None, "bytes": content.getvalue()}
    if isinstance(visual, str) and not visual.lower().endswith(
        (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3")
    ):
        return {"path": visual, "bytes": None}
    raise UserError(
        f"a task shows a {type(visual).__name__} ({str(visual)[:60]}), but only pictures can be asked about."
    )
