"""What a language model needs to talk about images: a token in their place, and a chat template with image parts."""

from __future__ import annotations

import re
from typing import Any, Literal

IMAGE_TOKEN = "<image>"
_PLACEHOLDERS = (IMAGE_TOKEN, "<|image_pad|>", "<|image|>", "<image_soft_token>")  # made for images
_SPARE = re.compile(r"<unused\d+>|<\|?(?:reserved|extra|placeholder)\w*\d+\|?>|<\|dummy_\d+\|>|<reponame>")
Origin = Literal["its own", "a spare token", "added"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The system prompt of Vicuna, LLaVA-1.5 and TinyLLaVA."""

# A turn's parts as one string, images first as in LLaVA; the generation block marks what is trained.
_VICUNA = """\
{%- set start = namespace(system=SYSTEM) -%}
{%- for message in messages -%}
{%- set turn = namespace(text='', images='') -%}
{%- if message['content'] is string -%}{%- set turn.text = message['content'] -%}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set turn.images = turn.images + IMAGE -%}
{%- else -%}{%- set turn.text = turn.text + part['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if turn.images -%}{%- set turn.text = (turn.images + (turn.text | trim)) | trim -%}{%- endif -%}
{%- if message['role'] == 'system' -%}{%- set start.system = turn.text -%}
{%- else -%}
{%- if start.system -%}{{- start.system + ' ' -}}{%- set start.system = '' -%}{%- endif -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + turn.text + ' ' -}}
{%- else -%}{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + turn.text + EOS -}}{%- endgeneration -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

# Content parts become strings, which the language model's own template, that follows, knows.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set flat.messages = flat.messages + [message] -%}{%- else -%}
{%- set turn = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set turn.text = turn.text + IMAGE -%}
{%- else -%}{%- set turn.text = turn.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=turn.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def add_image_token(tokenizer: Any) -> tuple[str, Origin]:
    """Choose a token that stands for an image, and make it a special token of the tokenizer.

    A token made for images comes first, then a spare one that the vocabulary holds, such as <unused0>; last, <image>
    is added. Returns the token and where it is from.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    own = [token for token in _PLACEHOLDERS if token in vocabulary]
    spare = sorted((token for token in vocabulary if _SPARE.fullmatch(token)), key=vocabulary.__getitem__)
    token, origin = IMAGE_TOKEN, "added"
    if own:
        token, origin = own[0], "its own"
    elif spare:
        token, origin = spare[0], "a spare token"
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return token, origin  # type: ignore[return-value]


def chat_template(own: str | None, image_token: str, eos: str) -> str:
    """A chat template for messages with image parts.

    Args:
        own: the language model's, for messages whose content is a string; None takes `vicuna_template`.
        image_token: written once for each image, followed by a line end.
        eos: ends an answer where `own` is None.
    """
    if own is None:
        return vicuna_template(image_token, eos)
    return _FLATTEN.replace("IMAGE", _literal(f"{image_token}\n")) + own


def vicuna_template(image_token: str, eos: str, *, after_image: str = "\n") -> str:
    """ "USER: <image>\\n... ASSISTANT: ...", as LLaVA-1.5 and TinyLLaVA have it. A system turn replaces SYSTEM.

    Args:
        image_token: written once for each image, in front of the turn's text.
        eos: ends an answer.
        after_image: follows each image token.
    """
    filled = {"SYSTEM": SYSTEM, "IMAGE": image_token + after_image, "EOS": eos}
    template = _VICUNA
    for name, value in filled.items():
        template = re.sub(rf"\b{name}\b", _literal(value).replace("\\", "\\\\"), template)
    return template


def _literal(text: str) -> str:
    """A string as Jinja writes it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
