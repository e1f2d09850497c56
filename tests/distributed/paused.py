"""`maskft` whose second process gets SIGTERM after the third step."""

from __future__ import annotations

import os
import signal
from typing import Any

import maskft.trainer


def interrupt(original: Any) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step_end


if __name__ == "__main__":
    maskft.trainer.Watch.on_step_end = interrupt(maskft.trainer.Watch.on_step_end)
    from maskft.cli import main

    main()
