"""Batches: images opened, messages rendered by the processor, labels on the assistant's answers only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskft.data.images import open_image
from maskft.data.schema import text_of
from maskft.errors import DataError

IGNORED = -100
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

Row = Mapping[str, Any]
Message = dict[str, Any]


def prompt(row: Row) -> list[Message]:
    """Return the messages without the trailing assistant turn."""
    messages = list(row["messages"])
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def answer(row: Row) -> str:
    """Return the text of the last turn. Raises DataError unless that turn is the assistant's."""
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{_origin(row)}: the last turn is not the assistant's, so there is no answer. Add the answer.")
    return text_of(messages[-1])


class Collator:
    """Turns canonical rows into tensors; a data collator for Trainer and TRL's SFTTrainer.

    The chat template of the processor renders the messages. If it has `{% generation %}` markers, they tell which
    tokens are answers. Otherwise each conversation is also rendered up to every answer's start and end, which costs
    two more processor calls per answer.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        """`max_length` is the number of tokens, image tokens included, that a row may have (None: any)."""
        if max_length is not None and max_length < 1:
            raise DataError(f"max_length is {max_length}, but must be at least 1, or none for no limit.")
        tokenizer = processor.tokenizer
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise DataError("The processor has no chat template. Use a chat model, or set processor.chat_template.")
        if tokenizer.pad_token_id is None:
            raise DataError(
                "The tokenizer has no padding token. Set tokenizer.pad_token, for example to its eos_token."
            )
        self.processor = processor
        self.max_length = max_length
        self._template: str = template
        self._marked = bool(_GENERATION.search(template)) and bool(getattr(tokenizer, "is_fast", False))
        self._added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._image_id: int | None = getattr(processor, "image_token_id", None)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a right-padded batch with "input_ids", "attention_mask" and "labels" (batch x length, int64) and
        whatever the processor gives for images.

        Labels are the token ids on assistant answers, their end-of-turn tokens included, and -100 elsewhere.
        Raises DataError naming the row if an image is unusable, the row is longer than `max_length`, or the chat
        template does not let answers be told apart.
        """
        chats = [self._chat(row, row["messages"]) for row in rows]
        batch = self._encode(rows, chats, padding_side="right", answers=self._marked)
        self._limit(rows, batch)
        ids, used = batch["input_ids"], batch["attention_mask"].bool()
        if self._marked:
            answers = batch.pop("assistant_masks").bool() & used
        else:
            answers = torch.zeros_like(used)
            for number, (row, chat) in enumerate(zip(rows, chats, strict=True)):
                for start, end in self._spans(row, chat, ids[number][used[number]]):
                    answers[number, start:end] = True
        if self._image_id is not None:
            answers &= ids != self._image_id
        batch["labels"] = torch.where(answers, ids, IGNORED)
        return batch

    def prompts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a left-padded batch for generation: all turns up to the last answer, then the generation prompt."""
        chats = [self._chat(row, prompt(row)) for row in rows]
        batch = self._encode(rows, chats, padding_side="left", add_generation_prompt=True)
        self._limit(rows, batch)
        return batch

    def text_length(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Tokens of the messages' text, an image counting as what its bare mark in the text does."""
        text = self.processor.apply_chat_template(
            [_with_images(messages, [])], chat_template=self._template, tokenize=False
        )
        return len(self.processor.tokenizer(text, add_special_tokens=self._adds(text[0]))["input_ids"][0])

    def length_with(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> int:
        """Tokens of the messages with these opened images."""
        chat = _with_images(messages, images)
        return len(self._encode([{"origin": "a blank image"}], [chat], padding_side="right")["input_ids"][0])

    def _adds(self, text: str) -> bool:
        """Whether the processor puts special tokens around a rendered text; not where it starts with one."""
        start = self.processor.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _chat(self, row: Row, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Return the messages with the opened images in their parts."""
        needed = sum(part["type"] == "image" for message in messages for part in message["content"])
        if needed != len(row["images"]):
            raise DataError(
                f"{_origin(row)}: has {len(row['images'])} image(s) but {needed} image part(s) in its messages. "
                "Make the numbers equal."
            )
        try:
            images = [open_image(image) for image in row["images"]]
        except DataError as error:
            raise DataError(f"{_origin(row)}: {error}") from error
        return _with_images(messages, images)

    def _encode(
        self,
        rows: Sequence[Row],
        chats: list[list[Message]],
        *,
        padding_side: str,
        answers: bool = False,
        add_generation_prompt: bool = False,
    ) -> dict[str, Tensor]:
        if not rows:
            raise DataError("The batch has no rows. Give at least one.")
        try:
            encoded = self.processor.apply_chat_template(
                chats,
                chat_template=self._template,
                tokenize=True,
                return_dict=True,
                # Transformers looks for answers token by token, for which lists take a tenth of the time of tensors
                return_tensors=None if answers else "pt",
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=answers,
                processor_kwargs={"padding": True, "padding_side": padding_side},
            )
            if answers:
                kept = getattr(self.processor, "skip_tensor_conversion", None)
                encoded = encoded.convert_to_tensors("pt", skip_tensor_conversion=kept)
        except Exception as error:  # templates and processors raise many kinds
            names = ", ".join(_origin(row) for row in rows[:10])
            raise DataError(f"The processor cannot encode {names}: {error}") from error
        return dict(encoded)

    def _limit(self, rows: Sequence[Row], batch: dict[str, Tensor]) -> None:
        if self.max_length is None:
            return
        for row, length in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            if length > self.max_length:
                raise DataError(
                    f"{_origin(row)}: has {length} tokens, but max_length is {self.max_length}. "
                    f"Set max_length to at least {length}, or shorten or remove the row."
                )

    def _spans(self, row: Row, chat: list[Message], ids: Tensor) -> list[tuple[int, int]]:
        """Return the token ranges of the answers in `ids` (length, without padding)."""
        spans = []
        for number, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            start = self._prefix(row, chat[:number], ids, add_generation_prompt=True)
            last = number == len(chat) - 1
            end = len(ids) if last else self._prefix(row, chat[: number + 1], ids, add_generation_prompt=False)
            spans.append((start, self._end_of_turn(ids, start, end)))
        return spans

    def _prefix(self, row: Row, chat: list[Message], ids: Tensor, *, add_generation_prompt: bool) -> int:
        """Return the number of tokens of the first turns; raise DataError unless `ids` begins with them."""
        encoded = self._encode([row], [chat], padding_side="right", add_generation_prompt=add_generation_prompt)
        prefix = encoded["input_ids"][0]
        if not torch.equal(prefix, ids[: len(prefix)]):
            raise DataError(
                f"{_origin(row)}: the chat template renders the first {len(chat)} turn(s) differently when others "
                "follow, so the answers cannot be told apart. Use a chat template with {% generation %} markers."
            )
        return len(prefix)

    def _end_of_turn(self, ids: Tensor, start: int, end: int) -> int:
        """Return `end` moved back over white space which the template writes after its end-of-turn token."""
        stop = end
        while stop > start and not self.processor.tokenizer.decode([int(ids[stop - 1])]).strip():
            stop -= 1
        return stop if stop > start and int(ids[stop - 1]) in self._added else end


def _with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> list[Message]:
    """The messages with the opened images in their parts; without any, parts stay empty."""
    left = iter(images)
    chat = []
    for message in messages:
        parts = [
            {"type": "image", "image": next(left, None)}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"] or ""}
            for part in message["content"]
        ]
        chat.append({"role": message["role"], "content": parts})
    return chat


def _origin(row: Row) -> str:
    return str(row.get("origin") or row.get("id") or "a row")
