"""The model that `bench` times on a machine: what its times say of other models, until those have run.

Large enough that a rank computes, small enough for a minute: a FLUX.1 of another size, with
random weights, in Black Forest Labs' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from comfy_xdit.planning.request import ModelShape, Request

# Tokens of a prompt; numbers of a token, of a token of a prompt, of all of a prompt, of a time.
TEXT_TOKENS, CHANNELS, CONTEXT, POOLED, TIME = 512, 64, 256, 256, 256
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """One size of it.

    Args:
        double, single: blocks of the two kinds.
        width, heads: of a block.
        side: of the picture, in pixels.
        steps: of a loop.
        dtype_bytes: of a weight.
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

    def request(self, guided: bool) -> Request:
        """What is timed: a picture without guidance, or one with."""
        return Request.picture(
            self.shape, self.side, self.side, steps=self.steps, cfg=guided, dtype_bytes=self.dtype_bytes
        )

    def prompt(self) -> dict[str, Shape]:
        """What the transformer takes of one, by argument."""
        return {"context": (1, TEXT_TOKENS, CONTEXT), "y": (1, POOLED)}

    def weights(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every tensor of the file."""
        width, head = self.width, self.width // self.heads
        for layer, out, into in (
            ("img_in", width, CHANNELS), ("txt_in", width, CONTEXT),
            ("time_in.in_layer", width, TIME), ("time_in.out_layer", width, width),
            ("vector_in.in_layer", width, POOLED), ("vector_in.out_layer", width, width),
            ("final_layer.adaLN_modulation.1", 2 * width, width), ("final_layer.linear", CHANNELS, width),
        ):  # fmt: skip
            yield from _linear(layer, out, into)
        for block in range(self.double):
            for stream in ("img", "txt"):
                name = f"double_blocks.{block}.{stream}"
                yield from _linear(f"{name}_mod.lin", 6 * width, width)
                yield from _linear(f"{name}_attn.qkv", 3 * width, width)
                yield from _linear(f"{name}_attn.proj", width, width)
                yield from _linear(f"{name}_mlp.0", 4 * width, width)
                yield from _linear(f"{name}_mlp.2", width, 4 * width)
                yield from _norms(f"{name}_attn.norm", head)
        for block in range(self.single):
            name = f"single_blocks.{block}"
            yield from _linear(f"{name}.linear1", 7 * width, width)
            yield from _linear(f"{name}.linear2", width, 5 * width)
            yield from _linear(f"{name}.modulation.lin", 3 * width, width)
            yield from _norms(f"{name}.norm", head)


def _linear(name: str, out: int, into: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norms(name: str, head: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.query_norm.scale", (head,)
    yield f"{name}.key_norm.scale", (head,)


REFERENCES = {  # by kind of device
    "cpu": Reference(double=2, single=4, width=256, heads=4, side=512, steps=2, dtype_bytes=4),
    "cuda": Reference(double=4, single=8, width=1536, heads=24, side=1024, steps=10, dtype_bytes=2),
}
