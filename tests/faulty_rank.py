"""A rank without an engine that does what a test asks, or fails to. Starts faster than a real one."""

from __future__ import annotations

import resource
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from comfy_xdit.protocol.messages import Denoise, Ready, Sample
from comfy_xdit.protocol.rpc import Invitation, Rank
from comfy_xdit.protocol.spec import ModelSpec
from tests.deeds import address_space, be_ended, compile_for, compute, fail, hang, hang_with_the_interpreter
from worker.__main__ import run
from worker.loop import Run, serve

NOTHING = torch.zeros(1)


def do(what: str, *, rank: int | None = None, **words: Any) -> Denoise:
    """The message that has `rank` (default: all) do `what`, while the others wait for it."""
    conditions = {"do": what, "rank": rank, **words}
    return Denoise(ModelSpec("", "transformer"), NOTHING, NOTHING, conditions)


def join_many_groups() -> None:
    """As the engine does; each has a thread that looks around."""
    for _ in range(40):
        dist.new_group()


def answer_without_room() -> torch.Tensor:
    """More than the segment holds, which cannot grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return torch.zeros(1 << 20)


def keep_little_memory() -> None:
    """Addresses for a small message."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + (96 << 20), most))


DEEDS = {
    "nothing": lambda: None,
    "lose the heartbeat": lambda: None,
    "hang": hang,
    "hang with the interpreter": hang_with_the_interpreter,
    "sleep": lambda seconds: time.sleep(seconds),
    "join many groups": join_many_groups,
    "compute": compute,
    "compile": compile_for,
    "fail": fail,
    "say": lambda text, times: print(*[text] * times, sep="\n", flush=True),
    "be ended": be_ended,
    "answer what cannot cross": lambda: {1, 2},
    "answer without room": answer_without_room,
    "keep little memory": keep_little_memory,
}


def _faulty(end: Rank, _invitation: Invitation) -> None:
    if end.world_size > 1:
        dist.init_process_group(
            "gloo", store=end.group_store(), rank=end.rank, world_size=end.world_size,
            timeout=timedelta(minutes=30),
        )  # fmt: skip

    def denoise(message: Denoise, asked: Run) -> Any:
        words = dict(message.conditions)
        what, rank, steps = words.pop("do"), words.pop("rank"), words.pop("steps", 0)
        for step in range(steps):
            compute(0.05)
            asked.step(step + 1, steps + 1)
        if what == "lose the heartbeat" and rank == end.rank:
            end.ask_device = lambda: words["missing"]
            hang()
        value = DEEDS[what](**words) if rank in (None, end.rank) else None
        if end.world_size > 1:
            dist.barrier()
        return value

    end.send(0, Ready({}))
    serve(end, {Denoise: denoise, Sample: denoise}, torch.device("cpu"), lambda flag: flag)


if __name__ == "__main__":
    run(_faulty)
