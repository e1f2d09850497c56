"""What commands share: consoles, progress bars, quiet libraries."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sized
from typing import Any

from rich.console import Console
from rich.progress import track

notes = Console(stderr=True, highlight=False, soft_wrap=True)
"""For progress and remarks: stderr, so that stdout holds the result alone."""


def result_console(as_json: bool) -> Console:
    """Where a person's summary goes: stdout, or stderr where stdout is for JSON."""
    return notes if as_json else Console(highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def progress(label: str) -> Any:
    """A wrapper that shows a bar with the time left while its items are consumed."""

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        total = len(items) if isinstance(items, Sized) else None
        shown = notes.is_terminal  # elsewhere a bar would leave nothing but an empty line
        return track(items, description=label, total=total, console=notes, transient=True, disable=not shown)

    return wrap


class _Remarks(logging.Handler):
    """Log records of ours as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(self.format(record))


def _on_stderr(record: logging.LogRecord) -> bool:
    """A filter that prints errors to stderr and lets nothing through to the handlers."""
    if record.levelno >= logging.ERROR:
        notes.print(record.getMessage(), markup=False)
    return False


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and advice out of a user's way; their errors and our own remarks stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|peft|trl|transformers|huggingface_hub)\.")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(_on_stderr)  # whose handler, made when it is imported, writes to stdout
    logger = logging.getLogger("maskft")
    if not logger.handlers:
        logger.addHandler(_Remarks())
        logger.setLevel(logging.INFO)


def percent(share: float) -> str:
    """0.8125 -> "81.2 %"."""
    return f"{100 * share:.1f} %"
