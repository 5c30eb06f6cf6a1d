"""What is around the nodes without ComfyUI: MODEL, CLIP, VAE and CONTROL_NET are the handles themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from comfy_xdit.headless import files
from comfy_xdit.nodes.surroundings import SamplerInputs
from comfy_xdit.protocol.errors import Interrupted, InvalidInput
from comfy_xdit.protocol.spec import SAMPLERS, SCHEDULERS, LoraFile, ModelSpec

if TYPE_CHECKING:  # a workflow is checked before torch is imported, which takes seconds
    import torch

    from comfy_xdit.protocol.messages import Progress, Sample
    from comfy_xdit.remote import (
        Application,
        PicturePrompt,
        Remote,
        RemoteControlNet,
        RemoteModel,
        RemoteTextEncoders,
        RemoteVAE,
    )

ShowStep = Callable[[int, int], None]  # (steps done, steps)
_show_step: ContextVar[ShowStep | None] = ContextVar("show_step", default=None)
_stop_asked = False  # a plain flag: a signal handler must take no lock


class Headless:
    """Implements comfy_xdit.nodes.surroundings.Surroundings."""

    names = staticmethod(files.names)
    path = staticmethod(files.path)

    def begin(self) -> None:
        """There is nothing to prepare without ComfyUI."""

    def self_check(self) -> tuple[str, ...]:
        """What has changed in ComfyUI: nothing where there is none."""
        return ()

    def spec_of(self, path: Path, weight_dtype: str, checkpoint: bool = False) -> ModelSpec:
        """The diffusion model at `path`: there is no ComfyUI whose class it could have."""
        return ModelSpec.of(path, "transformer", weight_dtype)

    def model_of(self, remote: RemoteModel) -> RemoteModel:
        """MODEL: the handle itself."""
        return remote

    def clip_of(self, remote: RemoteTextEncoders) -> RemoteTextEncoders:
        """CLIP: the handle itself."""
        return remote

    def vae_of(self, remote: RemoteVAE) -> RemoteVAE:
        """VAE: the handle itself; it has decode and encode."""
        return remote

    def clip_and_vae(self, spec: ModelSpec) -> NoReturn:
        """Refused: they are ComfyUI's."""
        raise InvalidInput(
            f"CLIP and VAE of a checkpoint ({Path(spec.path).name}) are ComfyUI's own; open the workflow "
            "there, or use 'xDiT Load Pipeline' with the model's diffusers folder."
        )

    def controlnet_of(self, net: RemoteControlNet) -> RemoteControlNet:
        """CONTROL_NET: the handle itself."""
        return net

    def remote_of(self, thing: Any) -> Remote:
        """The handle behind a MODEL, CLIP or VAE. Raises InvalidInput if it is none of them."""
        from comfy_xdit.remote import Remote

        if not isinstance(thing, Remote):
            raise InvalidInput(
                f"{type(thing).__name__} is neither a MODEL, a CLIP nor a VAE; connect an xDiT loader."
            )
        return thing

    def remote_controlnet_of(self, control_net: Any) -> RemoteControlNet:
        """The handle behind a CONTROL_NET. Raises InvalidInput if it is none."""
        from comfy_xdit.remote import RemoteControlNet

        if not isinstance(control_net, RemoteControlNet):
            raise InvalidInput(
                f"{type(control_net).__name__} is no CONTROL_NET; connect 'xDiT ControlNet Loader'."
            )
        return control_net

    def with_lora(
        self, model: RemoteModel, file: LoraFile, weights: Iterable[str], strength: float
    ) -> RemoteModel:
        """A MODEL with a LoRA file of the ranks, which changes `weights` (native names)."""
        from comfy_xdit.remote import with_file

        return replace(model, patches=with_file(model.patches, file, weights, strength))

    def with_picture(self, model: RemoteModel, prompt: PicturePrompt) -> RemoteModel:
        """A MODEL that is prompted by one more picture."""
        return replace(model, pictures=(*model.pictures, prompt))

    def with_controlnet(
        self, conditioning: list[Any], control_net: RemoteControlNet, application: Application
    ) -> list[Any]:
        """A CONDITIONING whose option `control` has one more Application."""
        return [
            [context, {**options, "control": (*options.get("control", ()), application)}]
            for context, options in conditioning
        ]

    def decode_latent(self, vae: RemoteVAE, latent: torch.Tensor, tile: int) -> torch.Tensor:
        """(B, [T,] H, W, 3) in 0..1."""
        return vae.decode(latent, interrupted=interrupted, tile=tile)

    def samplers(self) -> list[str]:
        """Names for the sampler widget."""
        return list(SAMPLERS)

    def schedulers(self) -> list[str]:
        """Names for the scheduler widget."""
        return list(SCHEDULERS)

    def sample_request(
        self, model: RemoteModel, inputs: SamplerInputs
    ) -> tuple[Sample, Callable[[torch.Tensor], torch.Tensor]]:
        """KSampler's inputs as one message to the ranks, and what makes its answer a latent."""
        from comfy_xdit.headless import conversion
        from comfy_xdit.remote import at_sigmas

        remote = self.remote_of(model)
        described = remote.described(interrupted)
        request, finish = conversion.build_sample(remote.spec, described, inputs)
        conversion.hold_nets(remote, inputs.positive, inputs.negative)
        pictures = at_sigmas(remote.pictures, described.sampling.sigma_at)
        return replace(request, patches=remote.patches, image_prompts=pictures), finish

    def drive(self, model: RemoteModel, inputs: SamplerInputs) -> NoReturn:
        """Refused: the samplers of the host are ComfyUI's."""
        raise InvalidInput(
            f"a run that the ranks' own loop cannot make ({inputs.sampler_name}, {inputs.scheduler}) needs "
            "ComfyUI; open the workflow there, or choose another sampler and scheduler."
        )

    def progress(self, model: RemoteModel, steps: int) -> Callable[[Progress], None]:
        """What shows the ranks' progress on the running node."""
        show = _show_step.get()
        if show is None:
            return lambda done: None
        show(0, steps)
        return lambda done: show(done.step, done.steps)

    def interrupted(self) -> bool:
        """Whether the person has asked to stop; leaves the flag as it is."""
        return interrupted()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What the ranks report as Interrupted leaves this block with the flag cleared."""
        try:
            yield
        except Interrupted:
            raise_if_interrupted()
            raise


HEADLESS = Headless()


# ---------------------------------------------------------------------- progress and interrupt


@contextmanager
def showing_steps(show: ShowStep) -> Iterator[None]:
    """Within this block, steps of the ranks are shown by `show`."""
    token = _show_step.set(show)
    try:
        yield
    finally:
        _show_step.reset(token)


def request_interrupt() -> None:
    """Ask the run to stop at its next step; may be called from a signal handler."""
    global _stop_asked
    _stop_asked = True


def forget_interrupt() -> None:
    """A new run begins: what was asked before is over."""
    global _stop_asked
    _stop_asked = False


def interrupted() -> bool:
    """Whether the person has asked to stop; leaves the flag as it is."""
    return _stop_asked


def raise_if_interrupted() -> None:
    """Raise Interrupted and clear the flag, if the person has asked to stop."""
    if _stop_asked:
        forget_interrupt()
        raise Interrupted("interrupted")
