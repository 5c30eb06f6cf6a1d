"""Plans of ComfyUI's classes that draw pictures and came after 0.8.0."""

from __future__ import annotations

from worker.parallel import Plan

PLANS: dict[str, Plan] = {}
REASONS: dict[str, str] = {}  # class -> why it has none
