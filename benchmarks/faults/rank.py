"""A rank with the whole engine that does what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.faults.deeds import DEEDS
from benchmarks.faults.plan import CLOSE, START, mark_moment, planned
from comfy_xdit.protocol.messages import Ready, Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.rpc import Invitation, Rank
from worker.__main__ import run
from worker.loop import Run, serve

STEP = 3  # of a loop, after which it goes wrong


def _fail_if_planned(at: str, end: Rank) -> None:
    plan = planned(at, end.rank)
    if plan is not None:
        if plan.do != "leave in a collective":  # says itself when
            mark_moment()
        DEEDS[plan.do](end, **plan.words)


def _breaking(word: type, handler: Callable[[Any, Run], Any], end: Rank) -> Callable[[Any, Run], Any]:
    """The handler of a word, with what is planned: before it, or in a loop after a step."""

    def handle(message: Any, asked: Run) -> Any:
        if word is not Sample:
            _fail_if_planned(word.__name__, end)
            return handler(message, asked)
        report = asked.report

        def report_and_break(step: int, steps: int, preview: torch.Tensor | None = None) -> None:
            report(step, steps, preview)
            if step == STEP:
                _fail_if_planned(word.__name__, end)

        asked.report = report_and_break
        return handler(message, asked)

    return handle


def _engine(end: Rank, invitation: Invitation) -> None:
    _fail_if_planned(START, end)
    from worker.engine import Engine
    from worker.parallel import Degrees, RankGroups

    device = torch.device("cpu")
    groups = RankGroups(end, Degrees.of(ParallelConfig(**invitation.degrees)), device)
    engine = Engine(groups)
    end.send(0, Ready(engine.report()))
    handlers = {word: _breaking(word, handler, end) for word, handler in engine.handlers().items()}
    serve(end, handlers, device, groups.agree)
    _fail_if_planned(CLOSE, end)


if __name__ == "__main__":
    run(_engine)
