"""What is to be computed: the shape of a transformer, and how many tokens, rows and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it needs torch, and a plan for described GPUs does not
    from comfy_xdit.protocol.description import ModelDescription

DEFAULT_PIXELS = 1024
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class ModelShape:
    """One transformer, as far as time and memory depend on it.

    Args:
        family: its name, for people.
        heads: attention heads; as `ulysses_degree` only divisors of them are offered: equal work for all.
        width: hidden size.
        blocks: transformer blocks, of which `dual` attend to the image tokens a second time.
        parameters: numbers in all weights.
        cfg: whether it is guided by a second, negative prompt.
        text_tokens: a prompt's usual length.
        text_attends: the prompt's tokens go through the blocks with the picture's, and are not only read.
        products: multiplications per token and block, in units of width squared.
        pixels: height and width of a token in the picture.
        output: numbers that a step gives back per token.
        skips: blocks of the second half read the outputs of those of the first.
    """

    family: str
    heads: int
    width: int
    blocks: int
    parameters: int
    cfg: bool
    dual: int = 0
    text_tokens: int = 333
    text_attends: bool = True
    products: float = 12.0
    pixels: tuple[int, int] = (16, 16)
    output: int = 64
    skips: bool = False

    @classmethod
    def of(cls, described: ModelDescription) -> ModelShape:
        """The shape in what the ranks say of a model."""
        latent = described.latent
        return cls(
            described.family, described.heads, described.width, described.blocks, described.parameters,
            described.guided, described.dual, described.text_tokens, "text" in described.streams,
            described.products, tuple(latent.compression * part for part in latent.patch[-2:]),
            latent.channels * math.prod(latent.patch), described.skips,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """Names the shape in measured times: equal shapes take equal time."""
        return f"{self.family}/{self.width}x{self.blocks}+{self.dual}/{self.heads}"


@dataclass(frozen=True)
class Request:
    """One run: `batch` pictures of so many tokens; `dtype_bytes` is the size of a number in the ranks."""

    shape: ModelShape
    image_tokens: int
    text_tokens: int
    steps: int = DEFAULT_STEPS
    cfg: bool = False
    batch: int = 1
    dtype_bytes: int = 2

    @classmethod
    def picture(
        cls, shape: ModelShape, width: int = DEFAULT_PIXELS, height: int = DEFAULT_PIXELS, **more: Any
    ) -> Request:
        """A picture of so many pixels, with guidance as the model uses it unless `cfg` says otherwise."""
        down, across = shape.pixels
        tokens = -(-width // across) * -(-height // down)
        return cls(shape, tokens, shape.text_tokens, **{"cfg": shape.cfg, **more})

    @property
    def rows(self) -> int:
        """Rows of the batch a transformer call has: a guided picture is two."""
        return self.batch * (2 if self.cfg else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one row that go through the blocks."""
        return sum(self.streams)

    @property
    def streams(self) -> tuple[int, ...]:
        """The same, each stream by itself."""
        return (self.image_tokens, self.text_tokens) if self.shape.text_attends else (self.image_tokens,)

    @property
    def text_read(self) -> int:
        """Text tokens of one row that those in the blocks only read: keys of a cross attention."""
        return 0 if self.shape.text_attends else self.text_tokens
