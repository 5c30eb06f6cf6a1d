"""N ranks against plain diffusers, fp32: held by the tests, written to docs/parity.md by `make parity`."""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.layouts import LAYOUTS, PIPELINES, SHARDED, WIDE
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Sample
from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ModelSpec
from comfy_xdit.remote.model import RemoteModel
from tests import tiny
from tests.tiny import TinyModel

# Sums in another order (the attention of fewer heads, a batch in two halves) and nothing else.
PER_CALL, PER_RUN = 1e-5, 1e-4
MODELS = ("sd3", "sd3.5-medium", "flux")
SIGMA = 0.7
STEPS, CFG = 20, 3.0


@dataclass(frozen=True)
class Size:
    """One request: latent height and width, text tokens, batch."""

    name: str
    height: int
    width: int
    text: int
    batch: int

    @property
    def tokens(self) -> int:
        """Image tokens of each picture."""
        return self.height * self.width // 4


SIZES = (
    Size("divisible", 16, 16, 32, 2),
    Size("odd text", 16, 16, 33, 2),
    Size("odd image tokens", 6, 10, 32, 1),
    Size("both odd", 18, 14, 7, 2),
    Size("fewer than ranks", 2, 2, 1, 1),
)


def multiplier(model: TinyModel) -> float:
    """What turns sigma into the timestep ComfyUI hands to the transformer."""
    return 1.0 if model.family.name == "flux" else 1000.0


def one_call(model: TinyModel, source: Path, parallel: ParallelConfig, size: Size) -> float | None:
    """Relative L2 of one transformer call against plain diffusers; None when it is refused by name."""
    x = torch.randn(size.batch, 16, size.height, size.width, generator=torch.Generator().manual_seed(1))
    timestep = torch.full((size.batch,), SIGMA * multiplier(model))
    given = tiny.conditions(model.family, model.config, size.text, size.batch)
    expected = tiny.reference(model.family, model.module, x, timestep, given)
    remote = RemoteModel(ModelSpec.of(source, "transformer"), parallel)
    call = one_step if parallel.pipefusion_degree > 1 else RemoteModel.denoise
    try:
        return tiny.relative_l2(call(remote, x, timestep, given), expected)
    except InvalidInput:
        if size.tokens < fewest_tokens(parallel):
            return None
        raise


def fewest_tokens(parallel: ParallelConfig) -> int:
    """Image tokens below which a layout refuses a picture by name."""
    splits = parallel.ring_degree * parallel.pipefusion_degree > 1
    return parallel.ulysses_degree * parallel.ring_degree * parallel.pipefusion_degree if splits else 0


def one_step(
    remote: RemoteModel, x: torch.Tensor, timestep: torch.Tensor, given: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The transformer's output out of a run of one Euler step to sigma 0, which is x - sigma * output."""
    noise, sigmas = x / SIGMA, torch.tensor([SIGMA, 0.0])
    timesteps = torch.stack([timestep[0], timestep.new_zeros(())])
    request = Sample(
        remote.spec, "euler", sigmas, torch.zeros_like(x), noise, 1.0, given, None, timesteps
    )  # fmt: skip
    return (x - remote.sample(request)) / SIGMA


def worst(model: TinyModel, parallel: ParallelConfig, size: Size) -> float | None:
    """The worse of both file formats."""
    errors = [one_call(model, source, parallel, size) for source in (model.folder, model.file)]
    return None if None in errors else max(errors)


def twenty_steps(model: TinyModel, parallel: ParallelConfig) -> float:
    """Relative L2 of (latent - noise) after 20 Euler steps with guidance, against the same loop on diffusers.

    The prompts differ in length, so they cannot be one batch, and neither divides by two... nor does
    the picture: 5 x 7 tokens.
    """
    positive = tiny.conditions(model.family, model.config, 17, seed=3)
    negative = tiny.conditions(model.family, model.config, 8, seed=4)
    noise = torch.randn(1, 16, 10, 14, generator=torch.Generator().manual_seed(5))
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    x = noise.clone()
    for i in range(STEPS):
        t = (sigmas[i] * multiplier(model)).expand(1)
        guided = tiny.reference(model.family, model.module, x, t, positive)
        without = tiny.reference(model.family, model.module, x, t, negative)
        x = x + (sigmas[i + 1] - sigmas[i]) * (without + CFG * (guided - without))
    remote = RemoteModel(ModelSpec.of(model.file, "transformer"), parallel)
    request = Sample(
        remote.spec,
        "euler",
        sigmas,
        torch.zeros_like(noise),
        noise,
        CFG,
        positive,
        negative,
        sigmas * multiplier(model),
    )
    return tiny.relative_l2(remote.sample(request) - noise, x - noise)


def rows(models: dict[str, TinyModel], layouts: dict[str, ParallelConfig]) -> Iterator[list[str]]:
    """One row per method and family; the worst of both file formats counts."""
    for method, parallel in layouts.items():
        for name in MODELS:
            model = models[name]
            calls = [worst(model, parallel, size) for size in SIZES]
            yield [name, method, *map(cell, calls), cell(twenty_steps(model, parallel))]


def cell(error: float | None) -> str:
    """A number, or that the layout refuses the size."""
    return "refused" if error is None else f"{error:.1e}"


def table(models: dict[str, TinyModel], layouts: dict[str, ParallelConfig]) -> str:
    """The table as Markdown."""
    head = ["family", "method", *(size.name for size in SIZES), f"{STEPS}-step run"]
    lines = [head, ["---"] * len(head), *rows(models, layouts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGE = """# Parity: N ranks against plain diffusers

Relative L2, fp32, random tiny models in both file formats (diffusers folder, original single file; the
worse counts), measured by `make parity` on {machine}, torch {torch}. Limits held by
`tests/test_parity.py`: {per_call:g} per call, {per_run:g} per {steps}-step run (Euler, guidance
{cfg:g}, prompts of different odd length, 5 x 7 image tokens).

{table}

Four and eight ranks, on models of 8 heads with enough blocks for 8 stages (measured by `make parity` only):

{wide}

Columns but the last are one transformer call: (latent height, width, text tokens, batch) = {sizes}.
xfuser's own wrappers are silently wrong where text or image tokens do not divide (docs/xfuser.md, B2, B3,
B5); here padding is cut away between the Ulysses exchange and the attention. PipeFusion is measured here
with warm-up in every step; it runs whole loops only, so one call is a run of one Euler step.

{adapters}
{drift}"""


def main() -> None:
    """Print the table and write it to docs/parity.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, default=Path(__file__).parent.parent / "docs" / "parity.md")
    arguments = parser.parse_args()
    from benchmarks import adapters, pipefusion  # they build on this module

    with tempfile.TemporaryDirectory() as folder:
        models = tiny.write_models(Path(folder))
        text = table(models, LAYOUTS | PIPELINES | SHARDED)
        wide = table(tiny.write_models(Path(folder) / "wide", **tiny.WIDE), WIDE)
        added = adapters.section(Path(folder) / "adapters", models)
        drift = pipefusion.section(Path(folder))
    sizes = ", ".join(f"{s.name} ({s.height}, {s.width}, {s.text}, {s.batch})" for s in SIZES)
    page = PAGE.format(
        machine=f"{platform.machine()}, CPU, gloo",
        torch=torch.__version__,
        per_call=PER_CALL,
        per_run=PER_RUN,
        steps=STEPS,
        cfg=CFG,
        table=text,
        wide=wide,
        sizes=sizes,
        adapters=added,
        drift=drift,
    )
    arguments.write.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
