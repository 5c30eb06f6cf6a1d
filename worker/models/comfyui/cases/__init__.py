"""Calls of tiny models of ComfyUI's classes, of every kind that a graph makes of them.

With references, masks, ControlNets, sound; latents have odd numbers of tokens, and prompts too. What builds
the models (`models`) can be imported only where ComfyUI is.
"""

from worker.models.comfyui.cases import image, other, until_080, video
from worker.models.comfyui.cases.draw import Case, Draw

__all__ = ["CASES", "Case", "Draw"]

CASES: dict[str, Case] = {**until_080.CASES, **image.CASES, **video.CASES, **other.CASES}
