"""The twin of a model whose weights have diffusers' names: made of what the ranks say, not of its file.

Where this ComfyUI knows the model, its own BaseModel says what a conditioning means to it. Where it knows
none, the description does. Latents and sampling are those of the model's folder either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.model_base
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from comfy_xdit.comfy_types.model.detection import read_header, transformer_files
from comfy_xdit.comfy_types.model.twin import emptied
from comfy_xdit.protocol.description import LatentSpace, ModelDescription, PromptPart
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.outline import META

NO_TRANSFORMER = {"disable_unet_model_creation": True}  # of ComfyUI's BaseModel: one is put in its place
TYPES = {
    "flow": comfy.model_base.ModelType.FLOW,
    "epsilon": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
}
IMAGE = "concat_latent_image"  # what stock nodes call the picture that a video begins with
# ComfyUI's names of arguments that its samplers handle apart.
RENAMED = {"context": "c_crossattn"}


def described_twin(
    path: str | Path, described: ModelDescription, dtype: torch.dtype, manual_cast: torch.dtype | None
) -> Any:
    """ComfyUI's BaseModel of a model that the ranks describe, on the meta device.

    Args:
        path: the diffusers folder, whose tensors' names and shapes stand in for a transformer.
        dtype, manual_cast: as of build_twin.
    """
    config = _configuration(dict(described.twin or ()))
    config.set_inference_dtype(dtype, manual_cast)
    config.sampling_settings = _sampling_settings(described)
    if type(config) is _Configuration:
        twin: Any = DescribedModel(config, described)
    else:
        twin = config.get_model({}, "", device=META)
    kind = TYPES[described.sampling.prediction]
    twin.model_type, twin.model_sampling = kind, comfy.model_base.model_sampling(config, kind)
    if described.sampling.kind == "discrete":
        twin.model_sampling.set_sigmas(described.sampling.table)
    _fit(twin.latent_format, described.latent)
    twin.diffusion_model = StandIn(transformer_files(Path(path)), dtype)
    return emptied(twin)


class StandIn(torch.nn.Module):
    """Where ComfyUI has a transformer: weights by name and shape, and a call that goes elsewhere."""

    def __init__(self, files: list[Path], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        for file in files:
            for name, tensor in read_header(file).items():
                self._add(name, tensor)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> torch.Tensor:
        """As ComfyUI's classes: wrappers around the call itself."""
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, control, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> torch.Tensor:
        raise RuntimeError("the transformer is in the ranks; comfy_types.model.handles calls it there")

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self
        for part in path:
            owner = owner._modules.setdefault(part, torch.nn.Module())
        # Not by register_parameter: any name may stand in a file, `forward` too.
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


class DescribedModel(comfy.model_base.BaseModel):
    """A model that this ComfyUI has no class of."""

    def __init__(self, config: Any, described: ModelDescription):
        super().__init__(config, TYPES[described.sampling.prediction], device=META)
        self._prompt, self._beside = described.prompt, described.beside

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """What of a conditioning the model takes. What must be there and is not, the ranks say."""
        conds = {RENAMED.get(part.name, part.name): _cond(part, kwargs) for part in self._prompt}
        if self._beside:
            conds["c_concat"] = comfy.conds.CONDNoiseShape(self._picture(**kwargs))
        return {name: cond for name, cond in conds.items() if cond is not None}

    def _picture(self, noise: torch.Tensor, device: torch.device, **kwargs: Any) -> torch.Tensor:
        """The channels beside the latent: frames that are given, and zeros behind them."""
        result = torch.zeros(noise.shape[0], self._beside, *noise.shape[2:], device=device)
        given = kwargs.get(IMAGE)
        if given is None:
            return result
        given = given.unsqueeze(2) if given.ndim == 4 < noise.ndim else given  # a picture is a frame
        if given.ndim != noise.ndim or given.shape[1] != self._beside:
            raise InvalidInput(
                f"{IMAGE} is {tuple(given.shape)}, but this model takes {self._beside} channels beside its "
                f"latent {tuple(noise.shape)}; encode the picture with the VAE of the model's own folder."
            )
        sides = noise.shape[-1], noise.shape[-2]
        given = comfy.utils.common_upscale(given.to(device), *sides, "bilinear", "center")
        given = comfy.utils.resize_to_batch_size(self.process_latent_in(given), noise.shape[0])
        if given.shape[2] > result.shape[2]:
            raise InvalidInput(
                f"{IMAGE} has {given.shape[2]} latent frames, and the video has {result.shape[2]}; give "
                "fewer frames, or make the video longer."
            )
        result[:, :, : given.shape[2]] = given
        return result


class _Configuration(comfy.supported_models_base.BASE):
    """What ComfyUI has for each model it knows, of one that it does not know."""

    unet_config: ClassVar[dict[str, Any]] = {}


def _configuration(told: dict[str, Any]) -> Any:
    """This ComfyUI's configuration of the model that is told so, or one of our own."""
    known = next((c for c in comfy.supported_models.models if told and c.matches(told)), None)
    return (known or _Configuration)(told | NO_TRANSFORMER)


def _fit(latent_format: Any, space: LatentSpace) -> None:
    """Have a latent format be of the folder's latents; what previews need of it stays."""
    latent_format.latent_channels, latent_format.latent_dimensions = space.channels, space.dimensions
    latent_format.spacial_downscale_ratio = space.compression
    latent_format.temporal_downscale_ratio = space.frames
    latent_format.process_in, latent_format.process_out = space.scaled, space.unscaled


def _sampling_settings(described: ModelDescription) -> dict[str, Any]:
    return {"shift": described.sampling.shift, "multiplier": described.sampling.multiplier}


def _cond(part: PromptPart, given: Mapping[str, Any]) -> Any:
    """An argument of the transformer, of a CLIP_VISION_OUTPUT its tokens; None where there is none."""
    value = given.get(part.option or "cross_attn")
    value = part.default if value is None else getattr(value, "penultimate_hidden_states", value)
    if value is None:
        return None
    if isinstance(value, list):
        return comfy.conds.CONDList(value)
    return comfy.conds.CONDRegular(value if isinstance(value, torch.Tensor) else torch.tensor([float(value)]))
