"""What is to be computed: the shape of a transformer, and how many tokens, rows and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PIXELS_PER_TOKEN = 16  # a side: the VAE's factor 8 times patches of 2, of every family here
DEFAULT_PIXELS = 1024
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class ModelShape:
    """One transformer, as far as time and memory depend on it.

    Args:
        family: the name of the family.
        heads: attention heads; as `ulysses_degree` only divisors of them are offered: equal work for all.
        width: hidden size.
        blocks: transformer blocks, of which `dual` attend to the image tokens a second time.
        parameters: numbers in all weights.
        cfg: whether the family is guided by a second, negative prompt.
        text_tokens: a prompt's usual length.
        products: multiplications per token and block, in units of width squared.
    """

    family: str
    heads: int
    width: int
    blocks: int
    parameters: int
    cfg: bool
    dual: int = 0
    text_tokens: int = 333
    products: float = 12.0

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> ModelShape:
        """The shape in what a rank's Transformer says of itself (`describe`)."""
        names = ("family", "heads", "width", "blocks", "parameters", "cfg", "dual")
        known = FAMILIES.get(info["family"])
        text = known.text_tokens if known else cls.text_tokens
        return cls(**{name: info[name] for name in names}, text_tokens=text)

    @property
    def key(self) -> str:
        """Names the shape in measured times: equal shapes take equal time."""
        return f"{self.family}/{self.width}x{self.blocks}+{self.dual}/{self.heads}"


# Published models by the names a person uses.
FAMILIES = {
    "flux": ModelShape("flux", 24, 3072, 57, 11_901_408_320, cfg=False, text_tokens=512),
    "sd3": ModelShape("sd3", 24, 1536, 24, 2_028_328_000, cfg=True),
    "sd3.5-medium": ModelShape("sd3", 24, 1536, 24, 2_243_171_520, cfg=True, dual=13),
    "sd3.5-large": ModelShape("sd3", 38, 2432, 38, 8_056_627_520, cfg=True),
}


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
        """A picture of so many pixels, with guidance as the family uses it unless `cfg` says otherwise."""
        tokens = -(-width // PIXELS_PER_TOKEN) * -(-height // PIXELS_PER_TOKEN)
        return cls(shape, tokens, shape.text_tokens, **{"cfg": shape.cfg, **more})

    @property
    def rows(self) -> int:
        """Rows of the batch a transformer call has: a guided picture is two."""
        return self.batch * (2 if self.cfg else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one row, image and text."""
        return self.image_tokens + self.text_tokens
