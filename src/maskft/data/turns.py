"""Questions about one image joined into a conversation, as LLaVA's data has them: the image is seen once for all."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from maskft.data.images import image_names
from maskft.data.schema import text_of, text_part, turn

Row = Mapping[str, Any]


def join_turns(rows: Iterable[Row], turns: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Canonical rows with at most `turns` questions each, in an order drawn by `seed`.

    A row of one image, one question that begins with it, and one answer is joined with others about its image; every
    other row stays as it is. A joined row keeps the id of its first question.
    """
    given = list(rows)
    joined = []
    for places in together([_image(row) or number for number, row in enumerate(given)], turns, seed):
        first, *others = (given[place] for place in places)
        messages = list(first["messages"])
        for row in others:
            question, answer = row["messages"]
            messages += [turn("user", [text_part(text_of(question))]), answer]
        joined.append({**first, "messages": messages})
    return joined


def together(subjects: Iterable[Hashable], turns: int, seed: int) -> Iterator[list[int]]:
    """Places of equal subjects, at most `turns` at a time, in an order drawn by `seed`."""
    about: dict[Hashable, list[int]] = {}
    for place, subject in enumerate(subjects):
        about.setdefault(subject, []).append(place)
    draw = random.Random(f"{seed}:turns")
    for places in about.values():
        draw.shuffle(places)
        yield from (places[start : start + turns] for start in range(0, len(places), turns))


def _image(row: Row) -> Hashable:
    """The image of a row that can be joined with others, None for other rows."""
    if len(row["images"]) != 1 or [message["role"] for message in row["messages"]] != ["user", "assistant"]:
        return None
    kinds = [part["type"] for part in row["messages"][0]["content"]]
    return image_names(row) if kinds[0] == "image" and kinds.count("image") == 1 else None
