"""ComfyUI's detection for tiny files: where it takes a width from the published model, a file says its own.

The words are the name of a tensor of the file, as some detections see names and shapes alone. In every
process that has this folder on its path, which are the tests' ComfyUI and its ranks.
"""

import base64
import functools
import importlib.util
import json
import sys
from importlib.abc import MetaPathFinder

MARK = "tiny_size:"
PARTS = "parts"  # of a size: classes, by module and name, and what they are told
PUBLISHED = "published"  # of a size: what the configuration is known by, instead of what it says otherwise


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
            module.model_config_from_unet_config = _keeping_sizes(module.model_config_from_unet_config)

        spec.loader.exec_module = exec_module
        return spec


def _told(state_dict):
    """The size that a file says, if it says one."""
    for name in state_dict or {}:
        at = name.find(MARK)
        if at >= 0:
            return json.loads(base64.urlsafe_b64decode(name[at + len(MARK) :]))
    return {}


def _reading_sizes(original):
    def detect(state_dict, prefix, *args, **kwargs):
        config = original(state_dict, prefix, *args, **kwargs)
        if config is not None:
            told = _told(state_dict)
            _build_small(told.pop(PARTS, {}))
            published = told.pop(PUBLISHED, {})
            config |= told | published
        return config

    return detect


def _keeping_sizes(original):
    """Some configurations put widths of the published model over those that were detected."""

    def of_config(unet_config, state_dict=None, *args, **kwargs):
        config = original(unet_config, state_dict, *args, **kwargs)
        if config is not None:
            told = _told(state_dict)
            config.unet_config |= {
                name: size for name, size in told.items() if name not in (PARTS, PUBLISHED)
            }
        return config

    return of_config


def _build_small(parts):
    """From now on classes are built in a size that their owner does not pass on."""
    for place, size in parts.items():
        module, _, name = place.rpartition(".")
        module = importlib.import_module(module)
        made = getattr(module, name)
        setattr(module, name, functools.partial(getattr(made, "func", made), **size))


sys.meta_path.insert(0, _AfterDetection())
