"""What the handles of models in the ranks share: a spec, a layout, and messages to the group of that layout.

A handle owns nothing. Every message carries the spec, so a group that was restarted loads again by
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy_xdit.protocol.messages import Check, Load, Result
from comfy_xdit.protocol.parallel import ParallelConfig, available_devices
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.ranks.registry import holders, running_groups, worker_group

Interrupt = Callable[[], bool]


@dataclass
class Remote:
    """What all handles share. A model stays in the ranks while it has a handle, and a while longer."""

    spec: ModelSpec
    parallel: ParallelConfig
    info: dict[str, Any] = field(default_factory=dict)
    ranks = None  # all of them
    sent = None
    _is_held = False

    def load(self, interrupted: Interrupt | None = None) -> dict[str, Any]:
        """Have the spec loaded; fills and returns `info` (`describe` of what the ranks loaded).

        A group of another layout would have to go first. It is asked whether the spec is any good
        under the new layout: a bad file or degree never costs a running group.
        """
        parallel = self.parallel.check(available_devices())
        for group in running_groups():
            if group.parallel != parallel and group.pids:
                group.call(Check(self.spec, parallel), ranks=(0,), interrupted=interrupted)
        self.info = self._call(Load(self.spec), interrupted=interrupted).value
        return self.info

    def _call(self, message: Any, only: tuple[int, ...] | None = None, **options: Any) -> Result:
        group = worker_group(self.parallel)
        if not self._is_held:
            holders.hold(self, group.parallel, self.spec, self.sent)
            self._is_held = True
        return group.call(message, ranks=only or self.ranks, **options)
