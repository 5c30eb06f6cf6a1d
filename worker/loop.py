"""Commands in, answers out. The one place where every exception of a rank is caught."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from comfy_xdit.protocol.errors import Interrupted, InvalidInput, WorkerDied
from comfy_xdit.protocol.messages import Cancelled, Failure, Result, Stop
from comfy_xdit.protocol.rpc import Rank
from worker import log
from worker.clock import communication, reporting

TEXT_LIMIT = 16_000  # characters of a message or traceback that cross the bridge: nobody reads more


class Run:
    """One command while it runs: reports steps and learns of an interrupt."""

    def __init__(self, end: Rank, job: int, agree: Callable[[bool], bool]):
        self._end, self._job, self._agree = end, job, agree
        self.steps_done = 0

    def step(self, step: int, steps: int, preview: torch.Tensor | None = None) -> None:
        """Call on EVERY rank after every step. `preview` (rank 0): the denoised latent.

        Raises:
            Interrupted: the host asked to stop; on all ranks at the same step.
        """
        self.report(step, steps, preview)
        if self._agree(self.asked()):
            self.stop(step)

    def report(self, step: int, steps: int, preview: torch.Tensor | None = None) -> None:
        """The part of `step` that tells the host."""
        self.steps_done = step
        self._end.beat()
        if self._end.rank == 0:
            with reporting:
                self._end.progress(self._job, step, steps, preview)

    def pause(self) -> None:
        """Call on EVERY rank where a long step may be left off.

        Raises:
            Interrupted: as `step`.
        """
        self._end.beat()
        if self._agree(self.asked()):
            self.stop(self.steps_done)

    def asked(self) -> bool:
        """Whether the host asked to stop; only rank 0 hears it."""
        if self._end.rank > 0:
            return False
        with reporting:
            return self._end.interrupted(self._job)

    def stop(self, step: int) -> NoReturn:
        """Leave the command: `step` is the same on all ranks."""
        self.steps_done = step
        raise Interrupted(f"interrupted at step {step}")


def serve(
    end: Rank,
    handlers: dict[type, Callable[[Any, Run], Any]],
    device: torch.device,
    agree: Callable[[bool], bool],
) -> None:
    """Answer commands until the host says stop.

    Args:
        handlers: what to do for each message type; gets the message and its Run.
        device: where the tensors of a command are put.
        agree: rank 0's flag, given to every rank.
    """
    log.begin(end.log, end.rank)
    log.note("serves", pid=os.getpid(), device=str(device), torch=torch.__version__)
    while True:
        job, take = end.receive(device)
        message, failure = _taken(take)
        if isinstance(message, Stop):
            log.note("was told to stop")
            return
        communication.restart(device)
        reporting.restart(torch.device("cpu"))
        answer = failure or _answer(handlers, message, Run(end, job, agree))
        try:
            end.send(job, answer)
        except (TypeError, ValueError) as error:  # too long, or nothing that crosses: said in its place
            answer = _failure(error, invalid=False)
            end.send(job, answer)
        except OSError as error:  # the segment cannot grow; a failure lies in none
            answer = _failure(MemoryError(f"no memory for the answer: {error}"), invalid=False)
            end.send(job, answer)
        _note(type(message).__name__, job, answer)  # behind the answer: nobody waits for it


def _taken(take: Callable[[], Any]) -> tuple[Any, Failure | None]:
    """A message, or why this rank cannot have its tensors."""
    try:
        return take(), None
    except WorkerDied:  # not of this group's host, or not to be read: the next one would not be either
        raise
    except (OSError, MemoryError) as error:  # the segment cannot be mapped as far as it has grown
        return None, _failure(MemoryError(f"no memory for the message: {error}"), invalid=False)
    except RuntimeError as error:  # torch's, of a GPU and of main memory
        return None, _failure(error, invalid=False)


def _answer(
    handlers: dict[type, Callable[[Any, Run], Any]], message: Any, run: Run
) -> Result | Failure | Cancelled:
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            value = handlers[type(message)](message, run)
        exchanged = communication.read()  # which may wait for the device
        return Result(value, time.perf_counter() - began, exchanged, reporting.read())
    except Interrupted:
        return Cancelled(run.steps_done)
    except InvalidInput as error:
        return _failure(error, invalid=True)
    except Exception as error:
        return _failure(error, invalid=False)


def _note(kind: str, job: int, answer: Result | Failure | Cancelled) -> None:
    """A line about a command that has come to its end."""
    if isinstance(answer, Result):
        seconds = {name: getattr(answer, name) for name in ("seconds", "communication", "reporting")}
        log.note("done", command=kind, job=job, **seconds)
    elif isinstance(answer, Cancelled):
        log.note("cancelled", command=kind, job=job, step=answer.step)
    elif answer.invalid:
        log.note("refused", logging.WARNING, command=kind, job=job, error=answer.message)
    else:
        told = {"error": f"{answer.kind}: {answer.message}", "traceback": answer.traceback}
        log.note("failed", logging.ERROR, command=kind, job=job, **told)


def _failure(error: Exception, invalid: bool) -> Failure:
    return Failure(type(error).__name__, _clip(str(error)), _clip(traceback.format_exc()), invalid)


def _clip(text: str) -> str:
    """The beginning and the end of a long text."""
    left_out = len(text) - TEXT_LIMIT
    if left_out <= 0:
        return text
    half = TEXT_LIMIT // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"
