"""What PipeFusion costs in accuracy: drift of random models, and what the demo model's pictures show."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.parallel import ParallelConfig
from tests import pipefusion_runs as runs

STEPS, WARMUPS = 20, (1, 2, 4, 20)
LAYOUTS = {f"{n} stages": ParallelConfig(pipefusion_degree=n) for n in (2, 4)}
SCRIPTS = Path(__file__).parent.parent / "scripts"
TEXT = """## Drift of PipeFusion

After its warm-up steps PipeFusion computes with keys and values of other patches that are one step old.
How far a {steps}-step run (Euler, guidance 3, latent 30 x 26, so 15 x 13 tokens, prompts of 17 and 8 tokens)
gets from the exact one, by warm-up steps; relative L2 of (latent - noise), fp32. The models are random, of
7 blocks: the numbers show the algorithm, not what it does to a picture. `tests/test_pipefusion.py` holds
them equal to a simulation of stale keys and values in one process.

{drift}

Of 50 held-out prompts of the demo model (20 steps, Euler, guidance 3, pictures read back by
`scripts/check_demo_pictures.py`), the share whose picture shows everything the prompt says; that of the exact
run is in the last column. The demo model has 2 blocks.

{pictures}
"""


def drift_row(model: runs.tiny.TinyModel, parallel: ParallelConfig) -> list[str]:
    """Relative L2 for each number of warm-up steps."""
    asked = runs.request(model, (30, 26), steps=STEPS)
    expected = runs.plain(model, asked)
    return [f"{runs.drift(model, parallel, asked, expected, warmup):.1e}" for warmup in WARMUPS]


def picture_row(parallel: ParallelConfig) -> list[str]:
    """The demo model's score for each number of warm-up steps."""
    sys.path.append(str(SCRIPTS))
    from check_demo_pictures import held_out_captions, score

    from tests.test_demo_quality import draw

    captions, cells = held_out_captions(), []
    for warmup in WARMUPS:
        try:
            pictures = draw(captions, replace(parallel, warmup_steps=warmup))
        except InvalidInput:
            cells.append("refused")
        else:
            cells.append(f"{score(captions, pictures).all_right:.2f}")
    return cells


def section(folder: Path) -> str:
    """The part of docs/parity.md on drift, as Markdown."""
    models = runs.write_models(folder)
    drifts, pictures = [], []
    for layout, parallel in LAYOUTS.items():
        drifts += [[name, layout, *drift_row(model, parallel)] for name, model in models.items()]
        pictures.append([layout, *picture_row(parallel)])
    columns = [f"{warmup} of {STEPS}" for warmup in WARMUPS]
    return TEXT.format(
        steps=STEPS,
        drift=_table(["family", "stages", *columns], drifts),
        pictures=_table(["demo model", *columns], pictures),
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        print(section(Path(root)))
