"""Programs on two processes, launched as users launch them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "distributed"
LONGEST = 900
"""Seconds after which a launch has hung."""


Done = subprocess.CompletedProcess[str]


def launch(kind: str, module: str, *arguments: object, options: tuple[str, ...] = ()) -> Done:
    """Run `accelerate launch` with the shipped file for `kind` ("ddp", "fsdp2" or "zero3") on two processes.

    Args:
        kind: name of the file.
        module: what to run, as in `python -m`.
        arguments: its own.
        options: more for accelerate.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{kind}.yaml")),
        *("--num_processes", "2", "--main_process_port", "0", *options, "-m", module, *map(str, arguments)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LONGEST)
        finally:
            _end(process)
    return Done(command, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    """End a launch that is still there; it ends the processes it started when it is asked to, not when it is killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
