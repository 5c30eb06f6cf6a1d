"""Whether a layout is one for a class of ComfyUI's, and how it takes the class apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.proofs import PATCHES, TOKENS, UNPROVEN, why_not_spread
from comfy_xdit.protocol.spec import ModelSpec
from worker.models.comfyui.building import blocks
from worker.models.comfyui.proof import proven_plan
from worker.models.comfyui.spreading import Spread, candidates, catch_attention, planned_classes
from worker.models.plans.traits import Rows, traits_of
from worker.parallel import Degrees, Mesh, Plan, PlanMismatch, RankGroups, Stage, ring_kernel


class ComfyUILayout:
    """Of one file, whose class is called `name`.

    Args:
        config: what the class is built with.
        degrees: asked for; a layout that is only asked about has others than `groups`.
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], spec: ModelSpec, groups: RankGroups, degrees: Degrees
    ):
        self._name, self._spec, self._groups, self._degrees = name, spec, groups, degrees
        self._file = Path(spec.path).name
        self.traits = traits_of(name, config)
        self.plan: Plan | None = None  # where it is proven, and the layout needs one

    @property
    def planned(self) -> bool:
        """Whether the class has a plan."""
        return self._name in planned_classes()

    @property
    def streams(self) -> tuple[str, ...]:
        """Those of its plan, where it has one."""
        return candidates(self._name)[0].streams if self.planned else ()

    @property
    def rows_apart(self) -> bool:
        """Whether calls can be spread by rows."""
        return self.traits.rows is not Rows.TOGETHER

    @property
    def _methods(self) -> dict[str, str]:
        """What is asked of a plan: by the method of its proof, in words."""
        degrees, asked = self._degrees, {}
        if degrees.sequence > 1:
            asked[TOKENS] = f"ulysses_degree {degrees.ulysses} x ring_degree {degrees.ring}"
        if degrees.stages > 1:
            asked[PATCHES] = f"pipefusion_degree {degrees.stages}"
        return asked

    def check(self) -> None:
        """Raise InvalidInput for what this class cannot have.

        It is all that one rank can find out by itself.
        """
        degrees = self._degrees
        if degrees.stages > 1 and (degrees.sharded or not self.rows_apart):
            why = "shard_weights" if degrees.sharded else "a class whose rows depend on each other"
            raise InvalidInput(
                f"pipefusion_degree {degrees.stages} does not go with {why}, and {self._file} runs in "
                f"ComfyUI's own {self._name}; set pipefusion_degree to 1."
            )
        if not self._methods:
            return
        try:
            candidates(self._name)
        except PlanMismatch as error:
            raise self._refused(error) from error
        # In their own layout, ranks first agree on what they remember.
        if TOKENS in self._methods and degrees != self._groups.degrees:
            why = self.why_not_spread()
            if why not in ("", UNPROVEN):
                raise self._refused(why)

    def prove(self, whole: nn.Module) -> None:
        """Have `plan` proven for what the layout spreads, where it does; on all ranks alike.

        Args:
            whole: the class of this file, without memory.

        Raises:
            InvalidInput: it is not right, or not for this file's variant.
        """
        try:
            plans = [proven_plan(self._name, self._spec.comfyui, self._groups, m) for m in self._methods]
            if any(plan != plans[0] for plan in plans):
                raise PlanMismatch("Ulysses and Ring are right by another of its plans than PipeFusion")
            for self.plan in plans[:1]:
                Spread(whole, self.plan, Mesh()).close()
        except PlanMismatch as error:
            raise self._refused(error) from error

    def take_own(self, whole: nn.Module) -> None:
        """Leave in a module without memory what this rank has: of a layout only asked about, the first stage.

        Raises:
            InvalidInput: more stages than blocks, or the class cannot be cut into them.
        """
        if self._degrees.stages == 1:
            return
        index = self._groups.stage if self._degrees == self._groups.degrees else 0
        try:
            plan = self.plan or candidates(self._name)[0]
            Stage(whole, plan, self._name, index, self._degrees.stages, Mesh())
        except PlanMismatch as error:
            raise self._refused(error) from error

    def stage(self, module: nn.Module) -> Stage | None:
        """This rank's, of a module whose weights are unread; None where the layout has one."""
        if self._degrees.stages == 1:
            return None
        catch_attention()
        groups = self._groups
        stage = Stage(module, self.plan, self._name, groups.stage, self._degrees.stages, groups.mesh)
        stage.use(ring_kernel(module, groups))
        return stage

    def spread(self, module: nn.Module) -> Spread | None:
        """The loaded module with its tokens over ranks, where the layout spreads them and not its blocks."""
        if self.plan is None or self._degrees.stages > 1:
            return None
        return Spread(module, self.plan, self._groups.mesh, ring_kernel(module, self._groups))

    def why_not_spread(self) -> str:
        """Why tokens of this class are not spread, as far as is known: it is proven where they first are."""
        if self.plan is not None:
            return ""
        try:
            candidates(self._name)
        except PlanMismatch as error:
            return str(error)
        return why_not_spread(self._spec.comfyui, self._name)

    def _refused(self, why: Exception | str) -> InvalidInput:
        return InvalidInput(
            f"{' x '.join(self._methods.values())} cannot spread {self._file}: {str(why).rstrip('.')}. Set "
            "these degrees to 1, and cfg_parallel_degree, data_parallel_degree or shard_weights instead."
        )


def without_others(whole: nn.Module, own: nn.Module) -> tuple[str, ...]:
    """What the names of weights begin with that other stages have."""
    return tuple(f"{block}." for block in set(blocks(whole)) - set(blocks(own)))
