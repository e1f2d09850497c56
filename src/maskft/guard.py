"""What keeps a run from being lost: one process a folder, sound checkpoints, and an end with words.

another process in the folder    refused
SIGTERM                          the step is finished, a checkpoint saved, and the run ends as paused
a loss that is no number         the run stops; the masks before it are kept
disk full, folder not writable   the last sound checkpoint stays, and the message names it
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from maskft.checkpoints import newest_sound, seal
from maskft.errors import Paused, RunError, UserError

try:
    import fcntl
except ImportError:  # Windows: a folder is not locked there
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS = "checkpoints"
LOCK = ".lock"
LAST_GOOD = "last-good"
"""In the run folder: the adapter as it was before the loss was no number."""
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file became larger than is allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission to write",
    errno.EPERM: "there is no permission to write",
    errno.EIO: "the disk reports an error",
}
_TORCH_WRITE = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs")


class Guard:
    """Goes with one call of `train`: as a context it gives the folder free at the end and puts errors into words.

    Attributes:
        output: the run folder.
        stopped_at: the step after which SIGTERM ended the training; None otherwise.
    """

    def __init__(self, output: Path, say: Callable[[str], None]) -> None:
        self.output = output
        self.stopped_at: int | None = None
        self._say = say
        self._lock: IO[str] | None = None
        self._stop: StopOnSignal | None = None

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stop is not None:
            self._stop.restore()
        self._release()
        reason = disk_problem(error) if isinstance(error, Exception) and not isinstance(error, UserError) else None
        if reason is not None:
            raise RunError(
                f"{reason}, so the run {self.output} stopped. {self.kept()} Make room or give another --output, then "
                "call the same command again."
            ) from error

    def claim(self) -> None:
        """Make the folder and lock it, until the process ends.

        The lock is the kernel's (flock), so that a process that is killed holds none; what the file says is for people.

        Raises:
            RunError: a process that is alive has the folder.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / LOCK
        while True:
            lock = path.open("a+", encoding="utf-8")
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
                lock.close()
                raise RunError(
                    f"{self.output} is in use by {holder}. Wait for it or end it, or give another --output."
                ) from None
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
            lock.close()  # its holder removed it meanwhile
        lock.seek(0)
        if former := lock.read(200).strip():
            self._say(f"taking over from {former}, which ended without finishing")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def watch(self, trainer: Any) -> None:
        """Let the trainer stop on SIGTERM and on a loss that is no number."""
        trainer.guard = self
        self._stop = StopOnSignal(self)
        trainer.add_callback(self._stop)

    def finish(self, trainer: Any) -> None:
        """To be called after training. Raises Paused where SIGTERM ended it, RunError where its values are lost."""
        if self.stopped_at is not None:
            checkpoint, _ = newest_sound(self.output / CHECKPOINTS)
            raise Paused(self.stopped_at, trainer.state.max_steps, str(checkpoint))
        trainer.refuse_lost_values()

    def kept(self) -> str:
        """A sentence on the checkpoint that is left."""
        checkpoint, _ = newest_sound(self.output / CHECKPOINTS)
        return f"The last sound checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been saved."

    def _release(self) -> None:
        if self._lock is not None:
            (self.output / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


class StopOnSignal(TrainerCallback):
    """On SIGTERM, lets the step end, a checkpoint be saved and the training stop. A second one ends the process."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._asked = False
        self._former: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._former = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_asked(args) and state.global_step < state.max_steps:
            self._guard.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the former handler back."""
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
            self._former = None

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        self.restore()

    def _any_asked(self, args: Any) -> bool:
        """Whether any process was asked, since all must stop after the same step."""
        if args.world_size == 1:
            return self._asked
        asked = torch.tensor(int(self._asked), device=args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


class GuardedTrainer:
    """Goes before a Trainer among the bases of a class: sound checkpoints, and a stop at a loss that is no number.

    Attributes:
        guard: of the run; None leaves the loss alone.
    """

    guard: Guard | None = None
    args: Any
    state: Any
    model: Any
    accelerator: Any

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. Raises RunError before the optimizer's step if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.require_number(loss)
        return loss

    def require_number(self, loss: Tensor) -> None:
        """Raise RunError if a loss of training is not finite.

        To be called before the backward pass as well where that changes values.
        """
        if self.guard is not None and self.model.training and not torch.isfinite(loss).all():
            self._give_up(f"the loss of step {self.state.global_step + 1} is {loss.item()}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, but older checkpoints are removed only once this one has its manifest."""
        self.refuse_lost_values()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is of no use, and a full disk needs the room
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=limit, best_model_checkpoint=best)

    def refuse_lost_values(self) -> None:
        """Raise RunError if a value that is trained is not finite."""
        if self.guard is not None and not self._finite():
            self._give_up(f"after step {self.state.global_step} the trained values are not all numbers")

    def _finite(self) -> bool:
        """Whether all that is trained is, in this process."""
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return all(bool(torch.isfinite(getattr(p, "_local_tensor", p)).all()) for p in trained)

    def _give_up(self, why: str) -> None:
        """Raise RunError, with the adapter of the last step kept where its values are finite."""
        assert self.guard is not None
        kept = ""
        alone = self.args.world_size == 1 and hasattr(self.model, "peft_config")
        if alone and self._finite():
            folder = self.guard.output / LAST_GOOD
            shutil.rmtree(folder, ignore_errors=True)
            self.model.save_pretrained(folder)
            kept = f"The adapter as it was after step {self.state.global_step} is in {folder}. "
        raise RunError(
            f"{why}, so training stopped. {kept}{self.guard.kept()} Lower training.learning_rate, or use "
            "model.dtype=bfloat16 in place of float16, and give a new --output."
        )


def disk_problem(error: BaseException | None) -> str | None:
    """Why something could not be written, where that is behind an error; None for any other error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
            number = int(match[1])
        if number in _REASONS:
            name = getattr(error, "filename", None)
            return _REASONS[number] + (f" ({name})" if name else "")
        if _TORCH_WRITE.search(str(error)):
            return "a file of a checkpoint could not be written, perhaps because the disk is full"
        error = error.__cause__ or error.__context__
    return None
