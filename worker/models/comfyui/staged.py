"""Whether PipeFusion is right with a class of ComfyUI's: two stages, one after the other in this process.

What a stage reads of the blocks before it is said by the plan and by the class's own forward between its
blocks, which a version can change: so this is proven as the spreading of tokens is (proof.py). A call goes
through the stages as a whole; then, with the keys and values that it left, patch by patch, which must be the
same; and with those of another call, which must not be.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn

from worker.models.comfyui.cases import Case, Draw
from worker.models.comfyui.cases.models import given, outputs, tiny_model
from worker.models.comfyui.spreading import catch_attention
from worker.parallel import Mesh, Patches, Plan, Stage

STAGES = 2


class Line:
    """In place of a pipeline between processes: what one stage sends, the next one receives after it."""

    def __init__(self) -> None:
        self._on_way: deque[Any] = deque()
        self.tell = self.send = self._on_way.append

    def told(self) -> Any:
        """Plain data."""
        return self._on_way.popleft()

    def receive(self, _shape: Any, _dtype: torch.dtype) -> torch.Tensor:
        """A tensor."""
        return self._on_way.popleft()


def difference_in_patches(case: Case, plan: Plan, device: torch.device) -> tuple[float, float, float]:
    """Relative L2 to one rank of a call as a whole, of one in patches, and of one with another call's keys.

    Raises:
        PlanMismatch: the plan does not allow patches, or the class is not the one it was written for.
    """
    models = [tiny_model(case, device)[0] for _ in range(STAGES)]
    catch_attention()
    draws = [Draw(case.batches[0], seed) for seed in (1, 2)]
    first, other = (_Call(models, case, device, draw) for draw in draws)
    wanted = first.forward(0)  # no stage yet
    stages = [Stage(model, plan, case.name, i, STAGES, Mesh()) for i, model in enumerate(models)]
    line = Line()
    with stages[0].run(line), stages[1].run(line):
        patches = Patches.of(plan.patched, stages[0].length(lambda: first.forward(0)), STAGES)
        whole, in_patches = first.whole(stages, patches), first.in_patches(stages, patches)
        other.whole(stages, patches)
        stale = first.in_patches(stages, patches)
    return tuple(float((got - wanted).norm() / wanted.norm()) for got in (whole, in_patches, stale))


class _Call:
    """One call of a case. Under PipeFusion there is no ControlNet."""

    def __init__(self, models: list[nn.Module], case: Case, device: torch.device, draw: Draw):
        self._models = models
        self._args, kwargs = given(case, draw, device)
        self._kwargs = {name: value for name, value in kwargs.items() if name != "control"}

    def forward(self, stage: int) -> torch.Tensor:
        """Of the model of one stage; the first latent, where there are several."""
        return outputs(self._models[stage](*self._args, **self._kwargs))[0]

    def whole(self, stages: list[Stage], patches: Patches) -> torch.Tensor:
        """Through all stages, whose keys are kept."""
        return [stage.whole(lambda i=i: self.forward(i), 0, patches) for i, stage in enumerate(stages)][-1]

    def in_patches(self, stages: list[Stage], patches: Patches) -> torch.Tensor:
        """Patch after patch, each through all stages."""
        last = len(stages) - 1
        owners, result = stages[last].owners(lambda: self.forward(last), patches), None
        for number in range(len(patches.spans)):
            for i, stage in enumerate(stages):
                output = stage.patch(lambda i=i: self.forward(i), 0, patches, number)
            result = output.new_empty(output.shape) if result is None else result  # in one piece
            own = owners == number
            result.flatten(1)[:, own] = output.flatten(1)[:, own]
        return result
