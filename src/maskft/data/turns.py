"""Questions about one image joined into a conversation, as LLaVA's data has them: the image is seen once for all."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from maskft.data.schema import text_part, turn

Row = Mapping[str, Any]


def join_turns(rows: Iterable[Row], turns: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Canonical rows with at most `turns` questions each, in an order drawn by `seed`.

    A row of one image, one question that begins with it, and one answer is joined with others about its image; every
    other row stays as it is. A joined row keeps the id of its first question.
    """
    about: dict[Any, list[Row]] = {}
    for number, row in enumerate(rows):
        about.setdefault(_image(row) or number, []).append(row)
    draw = random.Random(f"{seed}:turns")
    joined = []
    for questions in about.values():
        draw.shuffle(questions)
        for start in range(0, len(questions), turns):
            first, *others = questions[start : start + turns]
            messages = list(first["messages"])
            for row in others:
                question, answer = row["messages"]
                text = "".join(part["text"] for part in question["content"] if part["type"] == "text")
                messages += [turn("user", [text_part(text)]), answer]
            joined.append({**first, "messages": messages})
    return joined


def _image(row: Row) -> tuple[Any, Any] | None:
    """The image of a row that can be joined with others, None for other rows."""
    if len(row["images"]) != 1 or [message["role"] for message in row["messages"]] != ["user", "assistant"]:
        return None
    kinds = [part["type"] for part in row["messages"][0]["content"]]
    image = row["images"][0]
    return (image["path"], image["bytes"]) if kinds[0] == "image" and kinds.count("image") == 1 else None
