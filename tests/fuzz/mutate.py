"""Ways to damage bytes, text and JSON, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, math.nan, math.inf, 2**63, 10**400),
    *("", " ", "\0", "../../etc/passwd", "a" * 5000, "ünï😀", "\ud800", "<image>", "1e-3", "null", "(a+)+$", "*"),
    *([], {}, [None], [[]], {"": None}, {"a": {"b": {}}}, ["<image>"] * 50, [1, "x", None], DEEP),
)


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    """The bytes with some flipped, cut, repeated, or put in from nowhere."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = draw.randrange(len(changed) + 1) if draw.random() < 0.5 else draw.randrange(min(len(changed), 400) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + draw.randrange(1, 40)]
        elif kind == 4:
            changed[at:at] = draw.randbytes(draw.randrange(1, 40))
        else:
            changed[at : at + 8] = draw.choice((b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f\0\0\0\0"))
    return bytes(changed)


def damaged_value(draw: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one place in it changed: replaced by junk, removed, doubled or renamed."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places:
        return draw.choice(JUNK)
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(key)[:-1] + draw.choice("xs_é")] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 3:
        other, name = draw.choice(places)
        holder[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
    else:
        holder[key] = copy.deepcopy(draw.choice(JUNK))
    return changed


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        keys: Any = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])


def as_text(value: Any) -> bytes:
    """JSON in bytes, whatever is in the value."""
    return json.dumps(value).encode()
