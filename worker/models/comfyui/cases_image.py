"""Calls of tiny models that draw pictures, of classes that came after 0.8.0."""

from __future__ import annotations

from worker.models.comfyui.draw import Case

CASES: dict[str, Case] = {}
