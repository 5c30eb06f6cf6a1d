"""CONTROL_NET: a ControlNet that the ranks run, in the form that ComfyUI's samplers and nodes know.

ComfyUI asks a control object for residuals before each call of the model. This one hands over what the
ranks need to compute them: a description that travels with the call. A MODEL that is not in the ranks
would never read it, and is refused before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import comfy.controlnet
import comfy.model_management
import torch

from comfy_xdit.comfy_types.model.patcher import HANDLE
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import AppliedControlNet
from comfy_xdit.remote import Application, RemoteControlNet, RemoteModel, check_mode, check_picture, mode_of

# Where the descriptions stand in a call's transformer_options: residuals of stock ControlNets go another
# way, and may come before or after ours in a chain.
NETS = "xdit_control_nets"
Percent = Callable[[float], float]


class RemoteControl(comfy.controlnet.ControlBase):
    """A ControlNet of the ranks for every stock node. Copies share the handle."""

    def __init__(self, net: RemoteControlNet):
        super().__init__()
        self.net = net
        self._remote: RemoteModel | None = None
        self._hints: dict[torch.Size, torch.Tensor] = {}  # of one run, by what is drawn: areas differ

    def copy(self) -> RemoteControl:
        """As stock: another application of the same net."""
        other = RemoteControl(self.net)
        self.copy_to(other)
        return other

    def set_cond_hint(
        self,
        cond_hint: torch.Tensor,
        strength: float = 1.0,
        timestep_percent_range: tuple[float, float] = (0.0, 1.0),
        vae: Any = None,
        extra_concat: Any = (),
    ) -> RemoteControl:
        """As stock: the hint picture (B, C, H, W) in 0..1, how strongly and when it acts."""
        if len(extra_concat):
            raise InvalidInput(
                f"{self.net.spec.name} takes no mask beside its hint; use a node that applies a ControlNet "
                "without a mask, or load an inpainting ControlNet with the stock node."
            )
        check_picture(cond_hint.movedim(1, -1))
        super().set_cond_hint(cond_hint, strength, timestep_percent_range)
        self.vae = vae
        return self

    def pre_run(self, model: Any, percent_to_timestep_function: Percent) -> None:
        """Before the first step of a run.

        Raises:
            InvalidInput: the MODEL is not in the ranks, or the hint cannot be encoded.
        """
        remote = getattr(model, HANDLE, None)
        if not isinstance(remote, RemoteModel):
            raise InvalidInput(
                f"the ControlNet {self.net.spec.name} is in the ranks, and this MODEL is a stock one, "
                "which would ignore it; load the MODEL with an xDiT loader, or the ControlNet with 'Load "
                "ControlNet Model'."
            )
        if self.cond_hint_original is None:
            raise InvalidInput(
                f"the ControlNet {self.net.spec.name} has no hint picture; apply it with a node."
            )
        self.net.refuse_without_vae(self.vae)
        check_mode(self.net, mode_of(self.extra_args.get("control_type")))
        self._remote = remote
        super().pre_run(model, percent_to_timestep_function)

    def get_control(
        self,
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: dict[str, Any],
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> dict[str, Any] | None:
        """The residuals of ControlNets before this one; its own description goes along with the call."""
        residuals = None
        if self.previous_controlnet is not None:
            residuals = self.previous_controlnet.get_control(
                x_noisy, t, cond, batched_number, transformer_options
            )
        if self._remote is None:
            raise InvalidInput(
                f"the ControlNet {self.net.spec.name} is asked for residuals by something that is no run "
                "of a MODEL in the ranks; load it with 'Load ControlNet Model' for that."
            )
        first, last = self.timestep_range
        if self.strength != 0 and not (t[0] > first or t[0] < last):
            described = self._described(x_noisy, batched_number)
            transformer_options[NETS] = [*transformer_options.get(NETS, ()), described]
        return residuals

    def whole_run(self, latent: torch.Tensor) -> tuple[AppliedControlNet, ...]:
        """This one and those before it for a loop in the ranks, after `pre_run`; latent is (B, C, H, W)."""
        before = self.previous_controlnet.whole_run(latent) if self.previous_controlnet is not None else ()
        return (*before, self._described(latent, 1, self.timestep_range)) if self.strength != 0 else before

    def cleanup(self) -> None:
        """As stock: after a run."""
        super().cleanup()
        self._remote = None
        self._hints.clear()

    def _described(
        self, x: torch.Tensor, batched_number: int, sigmas: tuple[float, float] | None = None
    ) -> AppliedControlNet:
        """What the ranks are told.

        Args:
            x: what is drawn, (B, C, H, W), B of `batched_number` conditionings.
            sigmas: the first and the last noise level at which it acts; None is always.
        """
        size = x.shape[-2:]
        if size not in self._hints:
            self._hints[size] = self._encoded(x)
        self.net.needed_by(self._remote)
        hint = comfy.controlnet.broadcast_image_to(self._hints[size], x.shape[0], batched_number)
        mode = mode_of(self.extra_args.get("control_type"))
        if sigmas is not None:
            sigmas = float(sigmas[0]), float(sigmas[1])
        return AppliedControlNet(self.net.spec, hint, float(self.strength), mode, sigmas)

    def _encoded(self, x: torch.Tensor) -> torch.Tensor:
        image = self.cond_hint_original.movedim(1, -1)
        space = self._remote.described().latent
        if self.net.kind.takes == "pixels":
            return self.net.hint(image, x, space)
        management = comfy.model_management
        # Encoding may push a stock ControlNet off the GPU that takes part in this run.
        loaded = management.loaded_models(only_currently_used=True)
        hint = self.net.hint(image, x, space, self.vae.encode, self.vae.spacial_compression_encode())
        management.load_models_gpu(loaded)
        return hint


def remote_controlnet_of(control_net: Any) -> RemoteControlNet:
    """The handle behind a CONTROL_NET.

    Raises:
        InvalidInput: it is a stock one.
    """
    if not isinstance(control_net, RemoteControl):
        raise InvalidInput(
            f"{type(control_net).__name__} is no ControlNet of the ranks; load it with 'xDiT ControlNet "
            "Loader', or apply it with the stock node 'Apply ControlNet'."
        )
    return control_net.net


# Applied to two conditionings alike it is one object: ComfyUI puts only such into one batch.
_applied: WeakValueDictionary[tuple[Any, ...], RemoteControl] = WeakValueDictionary()


def with_controlnet(
    conditioning: list[Any], control_net: RemoteControl, application: Application
) -> list[Any]:
    """A CONDITIONING with a CONTROL_NET behind those it has already."""
    applied = []
    for context, options in conditioning:
        control = _control(control_net, application, options.get("control"))
        applied.append([context, {**options, "control": control, "control_apply_to_uncond": False}])
    return applied


def _control(control_net: RemoteControl, new: Application, before: Any) -> RemoteControl:
    """`control_net` as it is applied, after the ControlNet `before`."""
    key = (*map(id, (new.net, new.image, new.vae, before)), new.strength, new.start, new.end, new.mode)
    control = _applied.get(key)
    if control is None:
        picture = new.image.movedim(-1, 1)
        control = control_net.copy().set_cond_hint(picture, new.strength, (new.start, new.end), vae=new.vae)
        control.set_previous_controlnet(before)
        control.image = new.image  # that no other tensor gets its id
        if new.mode is not None:
            control.set_extra_arg("control_type", [new.mode])
        _applied[key] = control
    return control


def runs_in_ranks(control: Any) -> bool:
    """Whether all ControlNets of a chain do."""
    while control is not None:
        if not isinstance(control, RemoteControl):
            return False
        control = control.previous_controlnet
    return True


def nets_of_run(
    model: Any, control: RemoteControl | None, latent: torch.Tensor
) -> tuple[AppliedControlNet, ...]:
    """The ControlNets of a chain for a loop in the ranks that draws `latent` (B, C, H, W)."""
    if control is None:
        return ()
    control.pre_run(model.model, model.get_model_object("model_sampling").percent_to_sigma)
    try:
        return control.whole_run(latent)
    finally:
        control.cleanup()
