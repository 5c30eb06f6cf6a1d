"""What the transformer of a twin was when it was built, to tell when a node changes it.

The ranks have a transformer of their own: a block that is replaced on the host, a function put over
one, a hook, a weight set anew would be ignored there. Such changes are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch.nn.modules import module as every_module

from comfy_xdit.comfy_types.model.original_code import OriginalCode
from comfy_xdit.protocol.errors import InvalidInput

ORIGINAL = "xdit_original"  # attribute of the twin
TRANSFORMER = "diffusion_model"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks")  # of torch.nn.modules.module
# What torch changes by itself, and what ComfyUI reads on the host.
_FREE = {"training", "dtype"}
_PLAIN = (bool, int, float, str, tuple, type(None))


class Original:
    """Modules, weights, hooks, functions, plain attributes and the code of a transformer, as they are now.

    Refers to nothing that refers to the twin: as its attribute it makes no cycle.
    """

    def __init__(self, transformer: torch.nn.Module, packs: Sequence[str] = ()):
        """As it is.

        Args:
            transformer: complete, with everything of ours in place.
            packs: folders of custom nodes.
        """
        modules = dict(transformer.named_modules(prefix=TRANSFORMER))
        self._transformer = id(transformer)
        self._parts = [_Part(name, module) for name, module in modules.items()]
        # The same once more, flat: what is looked at in each call of the transformer.
        self._live = [part.live for part in self._parts]
        self._sizes = list(map(len, self._live))
        self._live_children = [module._modules for module in modules.values()]
        self._children = [part.children for part in self._parts]
        self._hooks = [part.live[kind] for part in self._parts for kind in _HOOKS]
        self._hooks += [getattr(every_module, kind) for kind in _HOOKS_OF_ALL]
        self._code = OriginalCode(transformer, packs)
        self._values = [
            (live, key, value)
            for part in self._parts
            for live, kept in ((part.live["_parameters"], part.weights), (part.live, part.functions))
            for key, value in kept.items()
        ]

    def refuse_changes(self, twin: torch.nn.Module, whole: bool = False) -> None:
        """Raise InvalidInput for what differs.

        Args:
            twin: whose transformer it is.
            whole: look at everything; else, in microseconds, at what a node changes in mid-run.
        """
        replaced = id(twin._modules.get(TRANSFORMER)) != self._transformer
        if not replaced and self._is_same() and not (whole and self._plain_differs()):
            return
        found = [TRANSFORMER] if replaced else []
        found += [change for part in self._parts for change in part.changes()]
        found += [f"torch.nn.modules.module.{kind}" for kind in _HOOKS_OF_ALL if getattr(every_module, kind)]
        code = list(self._code.changes())
        if found or code:
            _refuse([*found, *code], lasting=bool(code))
        self._sizes = list(map(len, self._live))  # attributes that mean nothing to the class
        self._code.accept()

    def _is_same(self) -> bool:
        return (
            self._live_children == self._children
            and list(map(len, self._live)) == self._sizes
            and not any(self._hooks)
            and self._code.is_same()
            and all(live.get(key) is value for live, key, value in self._values)
        )

    def _plain_differs(self) -> bool:
        return any(not part.plain.items() <= part.live.items() for part in self._parts)


class _Part:
    """One module: the attributes it has (`live`), and what they were."""

    def __init__(self, name: str, module: torch.nn.Module):
        self.name, self._class, self.live = name, type(module), vars(module)
        self._keys = set(self.live)
        self.children, self.weights = dict(module._modules), dict(module._parameters)
        values = {key: value for key, value in self.live.items() if key not in _FREE}
        self.functions = {key: value for key, value in values.items() if _is_function(value)}
        self.plain = {key: value for key, value in values.items() if isinstance(value, _PLAIN)}

    def changes(self) -> Iterator[str]:
        """Names of what differs."""
        for live, kept in (
            (self.live["_modules"], self.children),
            (self.live["_parameters"], self.weights),
            (self.live, self.functions),
        ):
            yield from (f"{self.name}.{key}" for key, value in kept.items() if live.get(key) is not value)
        yield from (f"{self.name}.{key}" for key in self.live["_modules"].keys() - self.children.keys())
        yield from (f"{self.name}.{key}" for key, value in self.plain.items() if self.live.get(key) != value)
        # A new attribute acts where it hides one of the class: `forward`, `forward_orig` ...
        hiding = (key for key in self.live.keys() - self._keys if hasattr(self._class, key))
        yield from (f"{self.name}.{key}" for key in hiding)
        yield from (f"a hook of {self.name}" for kind in _HOOKS if self.live[kind])


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, (torch.nn.Module, type))


def _refuse(found: list[str], lasting: bool) -> NoReturn:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    restart = " and restart ComfyUI, since all models have the change until it ends" if lasting else ""
    raise InvalidInput(
        f"a node changed the inside of the transformer ({', '.join(found[:3])}{more}), which cannot reach "
        f"the ranks. Remove that node{restart}, or use the stock loader instead of the xDiT one."
    )
