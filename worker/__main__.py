"""Start of a rank: read the invitation, join the others, serve until told to stop."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from comfy_xdit.protocol.messages import Failure, Ready
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Invitation, Rank
from worker import lifeline


def main() -> None:
    """Run one rank of the engine."""
    run(_engine)


def run(program: Callable[[Rank, Invitation], None]) -> None:
    """Run `program` as a rank. Standard input carries the invitation and, by its end, the host's end."""
    # How the host learns where a rank hangs: it works whatever the interpreter does.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    invitation = Invitation.read(_line(sys.stdin.fileno()))
    with contextlib.suppress(OSError):  # for ps and top, where there is a /proc
        Path("/proc/self/comm").write_text(f"xdit rank {invitation.rank}")
    lifeline.follow(invitation.host_pid, sys.stdin.fileno())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    end = Rank(invitation)
    try:
        program(end, invitation)
    except ImportError as error:
        end.send(0, Failure(type(error).__name__, f"{error}; install the pack's requirements.txt", "", False))
        raise
    # Threads of torch.distributed may outlive their groups and hold the interpreter.
    sys.stdout.flush()
    os._exit(0)


def _engine(end: Rank, invitation: Invitation) -> None:
    """Load what a rank needs, say ready, and answer commands."""
    # Imported here: a missing package is then a Failure on the node instead of a silent end.
    from worker.engine import Engine
    from worker.loop import serve
    from worker.parallel import Degrees, RankGroups

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    groups = RankGroups(end, Degrees.of(ParallelConfig(**invitation.degrees)), device)
    engine = Engine(groups)
    if device.type == "cuda":
        end.ask_device = lambda: _has_work(device)
    end.send(0, Ready(engine.report()))
    serve(end, engine.handlers(), device, groups.agree)


def _has_work(device: torch.device) -> bool:
    """Whether the GPU has not done all that it was given; asked by a thread beside the rank's work."""
    try:
        return not torch.cuda.default_stream(device).query()
    except RuntimeError:  # the device has failed: the rank's own work says how
        return False


def _line(descriptor: int) -> bytes:
    """One line, byte by byte: a buffered reader would hide what follows from the lifeline."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            os._exit(lifeline.HOST_GONE)
        line += byte
    return line


if __name__ == "__main__":
    main()
