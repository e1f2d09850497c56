"""The command line. Exit codes: 0 done, 2 a user's mistake (one message, no traceback), 1 our fault."""

from __future__ import annotations

import os
import sys

from maskft.errors import UserError


def main() -> None:
    """Entry point of the `maskft` script."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    from maskft.cli.app import app

    try:
        app()
    except UserError as error:
        print(f"maskft: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
