"""A ModelPatcher that owns no bytes: what ComfyUI's memory management may do with it is nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from comfy_xdit.comfy_types.model.original import ORIGINAL
from comfy_xdit.comfy_types.model.patches import PREFIX, counts, describe
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import NO_PATCHES, PatchSet
from comfy_xdit.protocol.spec import LoraFile
from comfy_xdit.remote import RemoteModel

HANDLE = "xdit_remote"  # attribute of the twin, the text encoders or the VAE

# More than 0, or ComfyUI would measure the twin and make room for it.
HOST_BYTES = 1
COMPUTE_DTYPE = "manual_cast_dtype"  # the attribute of the twin that ComfyUI's ModelComputeDtype patches
COMPILE_KEY = "torch.compile"  # under which ComfyUI's torch.compile nodes put their wrapper


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """Stock patcher whose weights are in the ranks. Clones share the model, and with it the handle.

    Derives from ModelPatcher by name: where ComfyUI replaces its default patcher by one that
    streams weights, this one must not follow.
    """

    def __init__(self, model: Any, load_device: Any, offload_device: Any, *args: Any, **kwargs: Any):
        super().__init__(model, load_device, offload_device, *args, **kwargs)
        self.size = HOST_BYTES
        self._described: tuple[Any, PatchSet] = (None, NO_PATCHES)  # and the uuid it was made for

    def clone(self, *args: Any, **kwargs: Any) -> RemotePatcher:
        """As stock: another set of patches over the same model."""
        other = super().clone(*args, **kwargs)
        if type(other) is not type(self) or other.model is not self.model:
            raise InvalidInput(
                "this ComfyUI clones a MODEL in a way that would lose its ranks; update comfy_xdit."
            )
        other._described = self._described
        return other

    # ------------------------------------------------------------------ LoRA and other weight patches

    def weight_patches(self) -> PatchSet:
        """The patches of this clone, for the ranks.

        Raises:
            InvalidInput: some cannot reach them.
        """
        if self._described[0] != self.patches_uuid:
            self._described = (self.patches_uuid, describe(self.patches))
        return self._described[1]

    def with_lora(self, file: LoraFile, weights: Iterable[str], strength: float) -> RemotePatcher:
        """A clone with `file`, which changes `weights` (native names), after the patches there are."""
        other = self.clone()
        keys = {PREFIX + name for name in weights}
        missing = keys - set(other.add_patches(dict.fromkeys(sorted(keys), file), strength))
        if missing:
            raise InvalidInput(
                f"{file.name} changes {min(missing)}, which ComfyUI's model lacks; use a stock LoRA node."
            )
        return other

    def _use_patches(self, wanted: bool) -> None:
        """From now on the twin's calls are made with the patches of this clone, or with none."""
        remote = getattr(self.model, HANDLE, None)
        if isinstance(remote, RemoteModel):
            remote.patches = self.weight_patches() if wanted else NO_PATCHES

    # ------------------------------------------------------------------ what cannot reach the ranks

    def refuse_what_stays_here(self) -> None:
        """Raise InvalidInput for any patch that would act on the twin only, and so be ignored."""
        if isinstance(getattr(self.model, HANDLE, None), RemoteModel):
            self.weight_patches()
            getattr(self.model, ORIGINAL).refuse_changes(self.model, whole=True)
        elif patched := [key for key, entries in self.patches.items() if any(map(counts, entries))]:
            _refuse(
                f"LoRA or other weight patches ({patched[0]} ...)",
                "Set strength_clip of the LoRA node to 0, or use LoraLoaderModelOnly",
            )
        if self.injections:
            _refuse(f"forward injections ({', '.join(map(str, self.injections))})", "Use a normal LoRA node")
        if self.weight_wrapper_patches:
            _refuse("weight wrappers", "Remove the node that adds them")
        inner = [name for name in self.object_patches if name.startswith("diffusion_model")]
        if inner:
            _refuse(
                f"patches of modules inside the transformer ({inner[0]})", "Remove the node that adds them"
            )
        if COMPUTE_DTYPE in self.object_patches:
            self._refuse_other_dtype(self.object_patches[COMPUTE_DTYPE])
        if self.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY):
            _refuse("torch.compile", "Remove the TorchCompileModel node")

    def _refuse_other_dtype(self, dtype: torch.dtype | None) -> None:
        """Raise InvalidInput where `dtype`, None for the weights' own, is not what the ranks compute in."""
        of_weights, cast_to = self.model.get_dtype(), self.model.model_config.manual_cast_dtype
        if (dtype or of_weights) != (cast_to or of_weights):
            _refuse(
                f"computing in {dtype or of_weights} (ModelComputeDtype)",
                "Choose weight_dtype in the xDiT loader node, which the ranks compute in",
            )

    def pre_run(self) -> None:
        """Before the first step of a run. Several clones share the twin: this one's patches count."""
        self.refuse_what_stays_here()
        self._use_patches(True)
        super().pre_run()

    def patch_hooks(self, hooks: Any) -> None:
        """Weight hooks per conditioning are refused; hooks without weights are only remembered."""
        if hooks is not None and self.get_combined_hook_patches(hooks):
            _refuse("LoRA hooks on conditioning", "Remove the hook nodes")
        self.current_hooks = hooks

    def unpatch_hooks(self, *_: Any, **__: Any) -> None:
        """No hook ever patched a weight."""
        self.current_hooks = None

    def deepclone_multigpu(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the ranks already are several GPUs."""
        _refuse(
            "a copy of the model per GPU", "Remove the MultiGPU or Select Device node; the ranks use all GPUs"
        )

    def get_key_patches(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: merging needs the weights."""
        _refuse("merging or extracting weights", "Load the model with a stock loader node for that")

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        """The names, without weights. Refused for a part: extracting a LoRA reads it."""
        if filter_prefix is not None:
            _refuse("extracting weights (LoraSave)", "Load the model with a stock loader node for that")
        return super().model_state_dict()

    def model_state_dict_for_saving(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: saving needs the weights."""
        _refuse("saving", "Load the model with a stock loader node for that")

    # ------------------------------------------------------------------ memory: nothing to move

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **_: Any,
    ) -> None:
        """Mark the model as loaded. The ranks load, and patch, by themselves at the first call."""
        self.refuse_what_stays_here()
        self._use_patches(True)
        with self.use_ejected():
            model = self.model
            model.device = device_to
            model.model_lowvram, model.lowvram_patch_counter = False, 0
            model.model_loaded_weight_memory, model.model_offload_buffer_memory = HOST_BYTES, 0
            model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True, **_: Any) -> None:
        """Mark the model as unloaded, which happens whenever others need memory: the ranks keep theirs."""
        if unpatch_weights:
            self._use_patches(False)
            self.model.current_weight_patches_uuid = None
            self.model.model_loaded_weight_memory = 0
            if device_to is not None:
                self.model.device = device_to
        super().unpatch_model(None, unpatch_weights=False)  # object patches and injections, as stock

    def partially_load(
        self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False, **_: Any
    ) -> int:
        """Load whole, whatever `extra_memory` is. Returns the bytes it took."""
        self.refuse_what_stays_here()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            loaded = self.model.model_loaded_weight_memory
            self.load(device_to, full_load=True)
            return HOST_BYTES - loaded

    def partially_unload(self, device_to: Any, *_: Any, **__: Any) -> int:
        """Unload whole. Returns the bytes it gave back."""
        freed = self.model.model_loaded_weight_memory
        self.unpatch_model(device_to)
        return freed

    def model_size(self) -> int:
        """Bytes on the host."""
        return HOST_BYTES

    def get_ram_usage(self) -> int:
        """Bytes on the host."""
        return HOST_BYTES

    def is_dynamic(self) -> bool:
        """Never: there are no weights here to stream."""
        return False

    def pinned_memory_size(self) -> int:
        """Bytes pinned on the host."""
        return 0

    def loaded_ram_size(self) -> int:
        """Bytes in the host's RAM."""
        return 0

    def partially_unload_ram(self, *_: Any, **__: Any) -> int:
        """Bytes given back: none."""
        return 0

    def pin_weight_to_device(self, *_: Any, **__: Any) -> None:
        """Nothing to pin."""

    def unpin_weight(self, *_: Any, **__: Any) -> None:
        """Nothing was pinned."""

    def unpin_all_weights(self, *_: Any, **__: Any) -> None:
        """Nothing was pinned."""


def _refuse(what: str, remedy: str) -> NoReturn:
    raise InvalidInput(
        f"{what} cannot reach the ranks in this version of comfy_xdit. {remedy}, "
        "or use the stock loader instead of the xDiT one."
    )
