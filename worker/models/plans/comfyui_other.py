"""Plans of ComfyUI's classes that draw sound, shapes in space and pixels and came after 0.8.0."""

from __future__ import annotations

from worker.parallel import Plan

PLANS: dict[str, Plan | tuple[Plan, ...]] = {}
REASONS: dict[str, str] = {}  # class -> why it has none
