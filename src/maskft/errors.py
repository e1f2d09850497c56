"""Every error a user can cause: what was given, what is allowed, what to do.

The command line turns a `UserError` into one message and exit code 2. Anything else that escapes is our
fault and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaskftError(Exception):
    """Root of the tree."""


class UserError(MaskftError, ValueError):
    """Something the user gave cannot be used."""


class RecipeError(UserError):
    """A recipe or an override has an unknown key or a value of the wrong kind."""


class DataError(UserError):
    """Training or test data has a flaw; the message names file and row."""


class ModelError(UserError):
    """A base model cannot be loaded, or a target matches nothing in it."""


class AdapterError(UserError):
    """An adapter does not fit: another base, missing, extra or misshapen tensors."""


class RunError(UserError):
    """A run folder is missing something, or belongs to another recipe."""


class StudyError(UserError):
    """A study's file, its storage or its runs cannot be used."""


class AuditError(UserError):
    """A strict audit found masks that cannot learn."""


class Paused(MaskftError):
    """Training was asked to stop, and did after saving a checkpoint.

    Attributes:
        step: the last step that was made.
        steps: how many the recipe asks for.
        checkpoint: where the state is.
    """

    def __init__(self, step: int, steps: int, checkpoint: str) -> None:
        super().__init__(
            f"paused after step {step} of {steps}, saved in {checkpoint}. The same command goes on from there."
        )
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


class MissingExtraError(UserError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, install: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}', which is not installed. Install it with: {install}")


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest allowed name, or an empty string."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def gathered(problems: list[str], limit: int = 10) -> str:
    """Join problems into an indented list of at most `limit` lines, counting the rest."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as escapes; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
