"""Lets a torchvision built for CUDA import beside a CPU-only torch, and ComfyUI detect tiny files.

Its compiled operators do not load there, and all it then needs at import are the schemas of two of
them. On PYTHONPATH of test processes only; the pack itself never needs it.
"""

import os
import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; acts when torchvision is first looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _define_schemas()


def _define_schemas():
    import torch

    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _define_schemas.library = library  # the schemas live as long as the library


sys.meta_path.insert(0, _BeforeTorchvision())

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import tiny_detection  # noqa: E402, F401 - acts when ComfyUI's detection is imported
