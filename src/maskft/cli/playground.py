"""maskft app"""

from __future__ import annotations

from pathlib import Path

from maskft.cli.output import notes, quiet_libraries
from maskft.errors import UserError

LOCAL = ("127.0.0.1", "localhost", "::1")


def run(
    base: str, adapters: list[str] | None, *, host: str, port: int | None, dtype: str | None, max_new_tokens: int
) -> None:
    from maskft.app.page import build, library, serve

    library()  # a missing one is told before a model is loaded
    quiet_libraries()
    from maskft.app.playground import Playground
    from maskft.evaluation.candidates import find_candidates

    given = [name for text in adapters or [] for name in ([text] if Path(text).exists() else text.split(",")) if name]
    candidates = find_candidates(base, given)
    notes.print(f"loading {candidates[0].model.base} and its masks")
    playground = Playground(candidates, dtype=dtype, max_new_tokens=max_new_tokens)
    if host not in LOCAL:
        notes.print(f"on {host} everyone in the network can use this page; there is no password")
    try:
        page = build(playground)
        address = serve(page, host=host, port=port, wait=False)
    except OSError as error:
        raise UserError(
            f"the page cannot be served on {host}, port {port or 'any'}: {error}. Give another --port."
        ) from error
    notes.print(f"page     {address}\nstop     Ctrl-C")
    page.block_thread()
