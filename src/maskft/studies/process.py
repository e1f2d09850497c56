"""Processes that work on trials for a worker: one for each set of environment variables, kept from trial to trial."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from maskft.errors import StudyError
from maskft.studies.trial import MISTAKE

POLL = 2.0
"""Seconds between looks at a trial."""
FORKS = sys.platform == "linux"
"""Whether a process is forked for each trial; elsewhere that is not safe, and each trial imports everything anew."""


class Processes:
    """See the module's docstring. What they say of themselves goes into a file, which is removed if it stays empty."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        self._file: IO[bytes] | None = None
        self._started: dict[tuple[tuple[str, str], ...], TrialProcess] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, job: Path, environment: Mapping[str, str], tick: Callable[[], bool]) -> int:
        """Work on a job of maskft.studies.trial; its exit code.

        Args:
            job: its file.
            environment: variables beside those of this process.
            tick: called every few seconds; where it returns False the job is asked to stop.

        Raises:
            StudyError: no job can be started.
        """
        key = tuple(sorted(environment.items()))
        known = self._started.get(key)
        if known is None or known.over():
            if known is not None:
                known.close()
            self._file = self._file or self.errors.open("ab")
            known = self._started[key] = TrialProcess(environment, self._file)
        try:
            return known.run(job, tick)
        except OSError as error:
            raise StudyError(f"the process that starts trials ended ({error}); see {self.errors}.") from error

    def close(self) -> None:
        """End the processes, with a checkpoint where one trains."""
        for process in self._started.values():
            process.close()
        self._started.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
            if self.errors.is_file() and not self.errors.stat().st_size:
                self.errors.unlink()


class TrialProcess:
    """A process of maskft.studies.trial."""

    def __init__(self, environment: Mapping[str, str], errors: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "maskft.studies.trial", *([] if FORKS else ["--once"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
        )
        self._buffer = b""
        self._used = False

    def run(self, job: Path, tick: Callable[[], bool]) -> int:
        """As `Processes.run`."""
        assert self._process.stdin is not None
        self._used = True
        self._process.stdin.write(f"{job}\n".encode())
        self._process.stdin.flush()
        _, _, pid = self._line(lambda: None).partition(" ")
        stopped = False

        def look() -> None:
            nonlocal stopped
            if not stopped and not tick():
                stopped = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)

        _, _, code = self._line(look).partition(" ")
        return int(code)

    def _line(self, tick: Callable[[], None]) -> str:
        """The next line it says."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if select.select([descriptor], [], [], POLL)[0]:
                if not (read := os.read(descriptor, 4096)):
                    raise BrokenPipeError("it said no more")
                self._buffer += read
            else:
                tick()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def over(self) -> bool:
        """Whether it takes no more jobs."""
        return self._process.poll() is not None or (self._used and not FORKS)

    def close(self) -> None:
        """End it, and a job that it works on after a checkpoint."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def last_words(code: int, output: Path) -> str:
    """Why a trial failed, from the end of what it printed."""
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.is_file() else []
    if code < 0:
        return f"ended by signal {-code} ({signal.Signals(-code).name}); if it was out of memory, see maskft plan"
    if code == MISTAKE and (said := [n for n, line in enumerate(lines) if line.startswith("maskft: ")]):
        return "\n".join(lines[said[-1] :]).removeprefix("maskft: ")
    return f"{lines[-1] if lines else 'it said nothing'} (all of it in {output})"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, as schedulers send it, interrupts as Ctrl-C does. Only in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
