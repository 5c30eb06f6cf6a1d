"""ComfyUI's detection for tiny files: where it takes a width from the published model, a file says its own.

The words are the name of a tensor of the file, as some detections see names and shapes alone. In every
process that has this folder on its path, which are the tests' ComfyUI and its ranks.
"""

import base64
import importlib.util
import json
import sys
from importlib.abc import MetaPathFinder

MARK = "tiny_size:"


def key(size):
    """The name of the tensor that says `size`."""
    return MARK + base64.urlsafe_b64encode(json.dumps(size).encode()).decode()


class _AfterDetection(MetaPathFinder):
    """Changes comfy.model_detection once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "comfy.model_detection":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        stock = spec.loader.exec_module

        def exec_module(module):
            stock(module)
            module.detect_unet_config = _reading_sizes(module.detect_unet_config)

        spec.loader.exec_module = exec_module
        return spec


def _reading_sizes(original):
    def detect(state_dict, prefix, *args, **kwargs):
        config = original(state_dict, prefix, *args, **kwargs)
        for name in state_dict:
            at = name.find(MARK)
            if config is not None and at >= 0:
                config |= json.loads(base64.urlsafe_b64decode(name[at + len(MARK) :]))
        return config

    return detect


sys.meta_path.insert(0, _AfterDetection())
