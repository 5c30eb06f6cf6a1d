"""docs/comfyui-changes.md: what `make test-comfyui` saw of ways to change a MODEL, on every version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

INTRODUCTION = """\
# A MODEL that is changed from outside, tried

Written by `make test-comfyui COMFYUI_DIR=...`: ways in which nodes of other packs change a model, done to a
stock MODEL and to an xDiT one of the same file (tiny SD3 and FLUX.1 with random weights, in the ranks
diffusers' class of each and ComfyUI's own of SD3; KSampler). `dm` is the transformer, `f` a function that
calls what was there before and changes its result.

* **refused**: an error on the node that names what was changed, before anything is drawn; the row says what
  one of them names.
* **right**: the latent of the changed stock MODEL, relative L2 at most 1e-5.

Each way changes the stock MODEL's picture in the same test, but for those marked *: that need a compiler or
fp16, which is not asked of it, or mean nothing, to some classes or to all. A change that lasts (of a class,
a file, PyTorch) is refused for every xDiT MODEL until ComfyUI is started again; one that a pack makes while
ComfyUI starts is found by where its function is written: in a folder of custom nodes. What is looked at:
`comfy_xdit/comfy_types/model/original.py` and `original_code.py`.

Not seen: functions that ComfyUI's files take from elsewhere in ComfyUI or from libraries, such as
`comfy.ops.cast_bias_weight`, where a pack replaces them there; settings of PyTorch (`torch.backends`).
"""
REFUSED, RIGHT = "refused", "right"


class WaysTable:
    """Of one version of ComfyUI, filled by tests in any order."""

    def __init__(self, version: str):
        self.version = version
        self.rows: dict[str, dict[str, str]] = {}  # way -> kind of model -> what came of it
        self.words: dict[str, str] = {}  # way -> what the refusal names

    def record(self, way: str, kind: str, came: str, words: str) -> None:
        """`came`: refused or right; `words` of an error."""
        self.rows.setdefault(way, {})[kind] = came
        if words:
            self.words[way] = words

    def is_whole(self, ways: list[str], kinds: list[str]) -> bool:
        """Whether all have been tried."""
        return all(set(self.rows.get(way, ())) == set(kinds) for way in ways)

    def write(self, page: Path, starred: set[str]) -> None:
        """The page, with what it says of other versions, and the results beside it as JSON."""
        results = page.with_suffix(".json")
        seen = json.loads(results.read_text()) if results.exists() else {}
        seen[self.version] = {
            way: {"came": row, "words": self.words.get(way, "")} for way, row in self.rows.items()
        }
        results.write_text(json.dumps(seen, indent=1) + "\n")
        page.write_text("\n".join(_lines(seen, starred)) + "\n")


def named(error: str) -> str:
    """What a refusal says is changed, without places of this machine."""
    inside = re.search(r"inside of the transformer \((.*?)\), which", error)
    words = inside[1] if inside else error.split(" cannot reach")[0].split(" is a weight of")[0]
    return re.sub(r"/\S+/", "", words).replace("|", "/")


def _lines(seen: dict[str, dict[str, dict]], starred: set[str]) -> Iterator[str]:
    versions = sorted(seen, key=lambda version: [int(n) for n in version.split(".")])
    yield INTRODUCTION
    yield f"| way | {' | '.join(versions)} | the refusal names |"
    yield f"|---|{'---|' * len(versions)}---|"
    for way in dict.fromkeys(way for version in versions for way in seen[version]):
        tried = [seen[version].get(way) for version in versions]
        cells = [_cell(one["came"]) if one else "" for one in tried]
        words = next((one["words"] for one in reversed(tried) if one and one["words"]), "")
        star = " *" if way in starred else ""
        yield f"| {way}{star} | {' | '.join(cells)} | {words} |"


def _cell(came: dict[str, str]) -> str:
    """One word where it is the same for all kinds of models."""
    if len(set(came.values())) == 1:
        return next(iter(came.values()))
    return ", ".join(f"{kind}: {what}" for kind, what in sorted(came.items()))
