"""The command line. Exit codes: 0 done or paused, 2 a user's mistake (one message, no traceback), 1 our fault."""

from __future__ import annotations

import logging
import os
import sys

from maskft.errors import Paused, UserError, printable


def main() -> None:
    """Entry point of the `maskft` script."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    for name in ("trl", "torchao", "bitsandbytes", "torch.utils._pytree"):  # which speak while they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    from maskft.cli.app import app

    try:
        app()
    except Paused as pause:
        print(f"maskft: {pause}", file=sys.stderr)  # noqa: T201
    except UserError as error:
        print(printable(f"maskft: {error}"), file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
