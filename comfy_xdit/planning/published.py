"""Published models by the names a person uses: what `python -m comfy_xdit plan` knows without a file."""

from __future__ import annotations

from comfy_xdit.planning.request import ModelShape

PUBLISHED = {
    "flux": ModelShape("flux", 24, 3072, 57, 11_901_408_320, cfg=False, text_tokens=512),
    "sd3": ModelShape("sd3", 24, 1536, 24, 2_028_328_000, cfg=True),
    "sd3.5-medium": ModelShape("sd3", 24, 1536, 24, 2_243_171_520, cfg=True, dual=13),
    "sd3.5-large": ModelShape("sd3", 38, 2432, 38, 8_056_627_520, cfg=True),
}
