"""The model that `bench` times on a machine: what its times say of other models, until those have run.

Large enough that a rank computes, small enough for a minute. Its weights are random (bench_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from comfy_xdit.planning.request import ModelShape, Request

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Reference:
    """One size of it.

    Args:
        double, single: blocks of the two kinds.
        width, heads: of a block.
        side: of the picture, in pixels.
        steps: of a loop.
    """

    double: int
    single: int
    width: int
    heads: int
    side: int
    steps: int
    dtype_bytes: int

    @property
    def shape(self) -> ModelShape:
        """As the ranks describe it."""
        width, blocks = self.width, self.double + self.single
        parameters = width**2 * (36 * self.double + 15 * self.single)
        return ModelShape("flux", self.heads, width, blocks, parameters, cfg=False, text_tokens=TEXT_TOKENS)

    def requests(self) -> Iterator[Request]:
        """What is timed: a picture without guidance, and one with."""
        plain = Request.picture(
            self.shape, self.side, self.side, steps=self.steps, dtype_bytes=self.dtype_bytes
        )
        yield plain
        yield replace(plain, cfg=True)


REFERENCES = {  # by kind of device
    "cpu": Reference(double=2, single=4, width=256, heads=4, side=512, steps=2, dtype_bytes=4),
    "cuda": Reference(double=4, single=8, width=1536, heads=24, side=1024, steps=10, dtype_bytes=2),
}
