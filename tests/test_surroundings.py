"""What is around the nodes: everything they ask for is there, under the same names and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pytest

from comfy_xdit.headless.surroundings import HEADLESS
from comfy_xdit.nodes.surroundings import Surroundings
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import SAMPLERS
from worker.sampling import samplers


def lacking(offered: Any) -> list[str]:
    """A sentence for every function of Surroundings that `offered` has not, or has with other arguments."""
    found = []
    for name, asked in vars(Surroundings).items():
        if name.startswith("_") or not inspect.isfunction(asked):
            continue
        (_, *wanted) = inspect.signature(asked).parameters.values()
        function = getattr(offered, name, None)
        if not callable(function):
            found.append(f"{name} is not there")
            continue
        has = inspect.signature(function).parameters.values()
        if [(p.name, p.kind, p.default) for p in has] != [(p.name, p.kind, p.default) for p in wanted]:
            found.append(f"{name} takes {_words(has)}, asked for is {_words(wanted)}")
    return found


def _words(parameters: Iterable[inspect.Parameter]) -> str:
    return ", ".join(p.name for p in parameters) or "nothing"


def test_headless_offers_what_the_nodes_need():
    assert lacking(HEADLESS) == []


def test_what_is_lacking_is_found():
    class Half:
        def path(self, kind: str, name: str) -> None: ...

        def names(self) -> None: ...

    said = lacking(Half())
    assert "names takes nothing, asked for is kind" in said
    assert "model_of is not there" in said
    assert not [sentence for sentence in said if sentence.startswith("path ")]


def test_the_nodes_offer_the_samplers_that_the_ranks_have():
    assert tuple(samplers.SAMPLERS) == SAMPLERS


def test_a_checkpoint_needs_comfyui(tmp_path):
    spec = HEADLESS.spec_of(tmp_path, "default", checkpoint=True)
    with pytest.raises(InvalidInput, match=r"CLIP and VAE of a checkpoint .* are ComfyUI's own"):
        HEADLESS.clip_and_vae(spec)
