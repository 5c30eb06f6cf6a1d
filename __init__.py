"""comfy_xdit as a ComfyUI node pack.

ComfyUI runs this file as a module named after its path and puts neither the pack nor its parent on
sys.path. So it loads `comfy_xdit` from beside it under its real name: one name per thing, here, in
the ranks and in the tests.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

WEB_DIRECTORY = "./web"


def _bind(name: str, folder: Path) -> None:
    """Import the package in `folder` as `name`, without touching sys.path."""
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_bind("comfy_xdit", Path(__file__).resolve().parent / "comfy_xdit")

if __package__:  # pytest imports the root of a checkout as a bare module, without a package
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
