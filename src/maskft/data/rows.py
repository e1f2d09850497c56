"""Turning one row of a known format into the canonical form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maskft.data.schema import IMAGE_MARKER, ROLES, image_part, text_part, turn
from maskft.errors import DataError, did_you_mean

_NAMES: dict[type, str] = {str: "a string", list: "a list"}
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class ImageRoot:
    """Resolves image paths below one folder and refuses those which leave it."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self._folders: dict[str, str] = {}

    def resolve(self, given: str) -> str:
        """Return the absolute path of an image; it need not exist. Raises DataError if it is outside the root."""
        if not given.strip() or "\0" in given:
            raise DataError(f"image path {given!r} is empty or has a null byte. Give a path relative to {self.root}.")
        if given.startswith(("http://", "https://", "data:")):
            raise DataError(f"image {given[:80]!r} is a web address. Download it and give its path.")
        require_text(given, "image path")
        folder, name = os.path.split(os.path.join(self.root, given))
        if folder not in self._folders:  # resolving costs a system call per path component
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], name)
        if name in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if not path.startswith(self.root.rstrip(os.sep) + os.sep):
            raise DataError(
                f"image path {given!r} leads to {path}, outside the image root {self.root}. "
                "Move the file below the root or give another image_root."
            )
        return path


def llava_row(row: Mapping[str, Any], root: ImageRoot) -> dict[str, Any]:
    """Convert {"id", "image"?, "conversations": [{"from", "value"}], "answers"?}.

    `<image>` in human turns marks images.
    """
    turns = _required(row, "conversations", list)
    messages = []
    for number, item in enumerate(turns):
        where = f"conversations[{number}]"
        _mapping(item, where)
        role = _required(item, "from", str, where)
        if role not in LLAVA_ROLES:
            raise DataError(_unknown(f"{where}: 'from' is", role, LLAVA_ROLES))
        value = _required(item, "value", str, where)
        messages.append(turn(LLAVA_ROLES[role], _split(value) if role == "human" else _text(value)))
    images = _images(row, "image", root)
    if not images and _count(messages):
        _suspect_key(row, "image")
    return {"images": images, "messages": messages, "answers": _answers(row)}


def messages_row(row: Mapping[str, Any], root: ImageRoot) -> dict[str, Any]:
    """Convert {"messages": [{"role", "content"}], "images" or "image", "answers"?}.

    Content is a string or a list of parts {"type": "text" or "image", "text"}. In strings of user turns `<image>`
    marks images; if nothing marks one, the images go to the front of the first user turn.
    """
    items = _required(row, "messages", list)
    if row.get("images") is not None and row.get("image") is not None:
        raise DataError("has both 'images' and 'image'. Keep one of them.")
    images = _images(row, "images" if row.get("images") is not None else "image", root)
    messages = []
    plain: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        where = f"messages[{number}]"
        _mapping(item, where)
        role = _required(item, "role", str, where)
        if role not in ROLES:
            raise DataError(_unknown(f"{where}: 'role' is", role, ROLES))
        content = _required(item, "content", (str, list), where)
        if isinstance(content, str):
            messages.append(turn(role, _split(content) if role == "user" else _text(content)))
            if role == "user":
                plain.append(messages[-1])
        else:
            messages.append(turn(role, [_part(part, f"{where}, part {i}") for i, part in enumerate(content)]))
    if images and plain and not _count(messages):
        plain[0]["content"] = [image_part() for _ in images] + plain[0]["content"]
    if not images and _count(messages):
        _suspect_key(row, "images")
    return {"images": images, "messages": messages, "answers": _answers(row)}


def _answers(row: Mapping[str, Any]) -> list[str] | None:
    """Return the references that a row lists beside the assistant's last turn, or None."""
    given = row.get("answers")
    if given is not None and not isinstance(given, list):
        raise DataError(f"'answers' is {_kind(given)}, but must be a list of strings: right answers to the last turn.")
    for number, text in enumerate(given or []):
        if not isinstance(text, str):
            raise DataError(f"answers[{number}] is {_kind(text)}, but must be a string.")
        require_text(text, f"answers[{number}]")
    return given or None


def _split(text: str) -> list[dict[str, Any]]:
    """Split text at the image markers; one newline next to a marker belongs to it."""
    pieces = text.split(IMAGE_MARKER)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append(image_part())
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        parts.extend(_text(piece))
    return parts


def _text(text: str) -> list[dict[str, Any]]:
    return [text_part(text)] if text else []


def _part(part: Any, where: str) -> dict[str, Any]:
    _mapping(part, where)
    kind = _required(part, "type", str, where)
    if kind == "image":
        held = [key for key in ("image", "path", "url", "bytes", "base64") if part.get(key) is not None]
        if held:
            raise DataError(f"{where}: the image is given inside the part ('{held[0]}'). List it under 'images'.")
        return image_part()
    if kind == "text":
        return text_part(_required(part, "text", str, where))
    raise DataError(_unknown(f"{where}: 'type' is", kind, ("image", "text")))


def _images(row: Mapping[str, Any], key: str, root: ImageRoot) -> list[dict[str, Any]]:
    given = row.get(key)
    if given is None:
        return []
    entries = given if isinstance(given, list) else [given]
    return [_image(entry, key if entries is not given else f"{key}[{i}]", root) for i, entry in enumerate(entries)]


def _image(entry: Any, where: str, root: ImageRoot) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"path": root.resolve(entry), "bytes": None}
    if isinstance(entry, Mapping):
        content, path = entry.get("bytes"), entry.get("path")
        if isinstance(content, bytes):
            return {"path": None, "bytes": content}
        if content is None and isinstance(path, str):
            return {"path": root.resolve(path), "bytes": None}
        if content is not None:
            raise DataError(f"{where}: 'bytes' is {type(content).__name__}, not binary. JSON holds paths only.")
        raise DataError(f"{where}: has the keys {sorted(entry)}, but neither 'path' nor 'bytes' is set.")
    raise DataError(f"{where}: is {_kind(entry)}, but a path or {{'path', 'bytes'}} is needed.")


def _count(messages: Iterable[Mapping[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: is {_kind(value)}, but an object is needed.")


def _required(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """Return `row[key]`; raise DataError if it is missing, of another kind or invalid."""
    prefix = f"{where}: " if where else ""
    if key not in row:
        hint = next((f" Did you mean '{key}' by '{name}'?" for name in row if did_you_mean(str(name), [key])), "")
        raise DataError(f"{prefix}has no key '{key}'; its keys are {sorted(map(str, row))}.{hint}")
    value = row[key]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = " or ".join(_NAMES[one] for one in kinds)
        raise DataError(f"{prefix}'{key}' is {_kind(value)}, but must be {allowed}.")
    if isinstance(value, str):
        require_text(value, f"{prefix}'{key}'")
    return value


def require_text(value: str, what: str) -> None:
    """Raise DataError if a string has half of a surrogate pair, which no tokenizer or table takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} is not valid Unicode ({error}). Repair the text.") from error


def _suspect_key(row: Mapping[str, Any], key: str) -> None:
    for name in row:
        if name not in ("id", "image", "images", "messages", "conversations") and did_you_mean(str(name), [key]):
            raise DataError(f"has '{IMAGE_MARKER}' but no key '{key}'. Did you mean '{key}' by '{name}'?")


def _unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    return f"{what} {given!r}, but must be one of {', '.join(allowed)}.{did_you_mean(given, allowed)}"


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"
