"""The words that cross the bridge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_xdit.protocol.parallel import ParallelConfig
from comfy_xdit.protocol.spec import ControlNet, HostComfyUI, IPAdapterFile, LoraFile, ModelSpec

if TYPE_CHECKING:  # a command that sends nothing need not wait for torch
    import torch

# What ControlNets add: for each place in the transformer a tensor (B or 1, tokens, width) or None per block.
Residuals = Mapping[str, "list[torch.Tensor | None]"]

# ------------------------------------------------------------------ host -> ranks


@dataclass(frozen=True)
class Load:
    """Have `spec` in memory. Answer: a dict that describes it (family, channels, dtype ...)."""

    spec: ModelSpec


@dataclass(frozen=True)
class Check:
    """Say whether `spec` could be loaded under `parallel`, without loading it.

    Answer: what `Load` would answer of a transformer, else None.
    """

    spec: ModelSpec
    parallel: ParallelConfig


@dataclass(frozen=True)
class CheckLora:
    """Say what `file` changes of the transformer `spec`, without changing it.

    Answer: {"weights": native names of what it changes, "unmatched": names of its tensors that match
    nothing, "text_encoders": how many are for text encoders}.
    """

    spec: ModelSpec
    file: LoraFile


@dataclass(frozen=True)
class CheckIPAdapter:
    """Say whether `file` is an IP-Adapter for the transformer `spec`, without reading its weights.

    `shapes` are those of what a picture was encoded to, by ComfyUI's names (image_embeds,
    penultimate_hidden_states). Answer: {"embeds": the name of what the adapter takes, "blocks": how
    many attentions it adds to}.
    """

    spec: ModelSpec
    file: IPAdapterFile
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prove:
    """Compare tiny models of a class of this ComfyUI's on one rank and on all, unless it is proven.

    Answer: a list of `Proof.plain`. With no name: the names of all classes that have a plan.
    """

    comfyui: HostComfyUI
    name: str = ""


@dataclass(frozen=True)
class Compare:
    """Compare the names in a diffusion model's files with those of known families.

    Without a ComfyUI with those of diffusers' classes alone. Answer: a list, most alike first, of {"name",
    "share": of the names of both those that both have, "more": names in the file alone, "lacking": in the
    family alone, "other": in both, with other dimensions}; block numbers in names are `*`.
    """

    path: str
    comfyui: HostComfyUI | None = None


@dataclass(frozen=True)
class Patch:
    """One change of one weight, as a LoRA file describes it, in ComfyUI's terms.

    `kind` is lora, loha, lokr, glora, oft, boft, diff or set; `tensors` are those of the kind, by
    name. It changes `length` slices of dimension `dim` from `start` on, if `offset` is (dim, start,
    length). The weight is scaled by `base` before; `swapped` exchanges the halves of the change.
    The kind `file` stands for everything `file` says of the weight; the ranks read it.
    """

    kind: str
    tensors: dict[str, Any]
    strength: float
    base: float = 1.0
    alpha: float | None = None
    offset: tuple[int, int, int] | None = None
    swapped: bool = False
    file: LoraFile | None = None


@dataclass(frozen=True)
class PatchSet:
    """All patches of a model by weight, in the order they apply; the weights have native names.

    `name` is made of the content; "" is no patch at all. `weights` is None where the ranks hold
    the set already; its tensors are `Keep`, or `Known` when another set brought them. `forget`
    names sets to drop.
    """

    name: str = ""
    weights: dict[str, tuple[Patch, ...]] | None = None
    forget: tuple[str, ...] = ()


NO_PATCHES = PatchSet()
# Among the conditions of a call, where its rows are padded: the true lengths (B,) of their prompts.
LENGTHS = "context_lengths"


@dataclass(frozen=True)
class AppliedControlNet:
    """A ControlNet that the ranks run beside the transformer.

    `hint` is what the VAE made of the picture, unscaled, (B or 1, C, H, W); or, where the ControlNet
    takes pictures, (B or 1, 3, height, width) in 0..1, of whole tokens. In `Denoise` it may be
    `Known`. `mode` is the control type of a union ControlNet. `sigmas` are the first and the last noise
    level at which it acts in a `Sample`; None is always.
    """

    net: ControlNet
    hint: Any
    strength: float
    mode: int | None = None
    sigmas: tuple[float, float] | None = None


@dataclass(frozen=True)
class ImagePrompt:
    """An encoded picture that prompts the transformer through an IP-Adapter.

    `embeds` is (N, width) or (N, tokens, width), a `Keep` or a `Known`; `weight` scales what it adds.
    It acts at noise levels (sigma) from `first` down to `last`.
    """

    file: IPAdapterFile
    embeds: Any
    weight: float
    first: float = 1.0
    last: float = 0.0

    def acts(self, sigma: float) -> bool:
        """Whether it counts at this noise level."""
        return self.first >= sigma >= self.last


@dataclass(frozen=True)
class Denoise:
    """One call of the transformer, with ComfyUI's arguments.

    `x` is (B, C, H, W), already scaled as the transformer expects; `timestep` is (B,), what
    ComfyUI hands to the transformer. A class of ComfyUI's own gets what it takes: several latents at
    once, videos, a timestep per token, and `transformer_options` among the conditions.
    `conditions` are the keyword arguments (context, y, guidance ...), each a tensor, a plain value, or a
    `Known` tensor. `forget` names tensors to drop.
    `control` holds the residuals of ControlNets on the host, (B or 1, tokens, width) or None per
    block, by the names ComfyUI gives the lists. They change with every call and are not kept.
    `nets` are the ControlNets that the ranks run themselves.
    `image_prompts` act in this call; rows that are True in `negative` (one per row, or empty: none)
    are of the negative prompt, which sees zeros instead.
    Answer: the transformer's output, shaped like `x`.
    """

    spec: ModelSpec
    x: Any
    timestep: Any
    conditions: dict[str, Any]
    forget: tuple[int, ...] = ()
    control: Residuals | None = None
    patches: PatchSet = NO_PATCHES
    nets: tuple[AppliedControlNet, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    negative: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Preprocess:
    """Have a method of the transformer computed that ComfyUI calls around its forward, with its weights.

    Answer: what the method returns.
    """

    spec: ModelSpec
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    patches: PatchSet = NO_PATCHES


@dataclass(frozen=True)
class Keep:
    """A tensor to hold under `name` until it is forgotten."""

    name: int | str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Known:
    """A tensor the ranks already hold."""

    name: int | str


@dataclass(frozen=True)
class Sample:
    """A whole sampling loop in the ranks.

    `latent` is (B, C, H, W), or (B, C, T, H, W) of videos, as the transformer has it; `noise` likewise;
    `sigmas` is (steps + 1,). `positive` and `negative` are keyword arguments of the transformer; negative is
    None when cfg is 1. `timesteps` (steps + 1,) are what the transformer gets for each of `sigmas`. `mask` is
    1 where the picture may change. `warmup_steps` are those PipeFusion does exactly. `positive_nets` and
    `negative_nets` are the ControlNets of each side. `prediction` is of sampling.PREDICTIONS; `sigma_data` is
    the model's, and `most` says that the run begins at its highest noise level: flow models need neither.
    Answer: the last latent, scaled.
    """

    spec: ModelSpec
    sampler: str
    sigmas: torch.Tensor
    latent: torch.Tensor
    noise: torch.Tensor
    cfg: float
    positive: dict[str, Any]
    negative: dict[str, Any] | None
    timesteps: torch.Tensor
    mask: torch.Tensor | None = None
    previews: bool = False
    patches: PatchSet = NO_PATCHES
    warmup_steps: int = 1
    positive_nets: tuple[AppliedControlNet, ...] = ()
    negative_nets: tuple[AppliedControlNet, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    prediction: str = "flow"
    sigma_data: float = 1.0
    most: bool = False


@dataclass(frozen=True)
class EncodeText:
    """Encode a prompt. `prompts` maps an encoder (l, g, t5xxl ...) to chunks of (text, weight).

    Answer: {"cond": (1, T, D), "pooled": (1, P) or None, "options": other tensors of a CONDITIONING by name,
    "notes": sentences on what was left out}.
    """

    spec: ModelSpec
    prompts: dict[str, list[list[tuple[str, float]]]]


@dataclass(frozen=True)
class Decode:
    """Latents (B, C, [T,] H, W), unscaled as in a LATENT socket, to pictures.

    `tile` is the edge of tiles in pixels, 0 is none. Answer: {"pixels": (B, 3, [T,] H, W), about
    -1..1, "ranks": how many ranks worked}.
    """

    spec: ModelSpec
    latent: torch.Tensor
    tile: int = 0


@dataclass(frozen=True)
class Encode:
    """Pictures (B, 3, [T,] H, W) in -1..1 to latents. `tile` as in `Decode`.

    Answer: {"latent": (B, C, [T,] H, W), unscaled, "ranks": how many ranks worked}.
    """

    spec: ModelSpec
    pixels: torch.Tensor
    tile: int = 0


@dataclass(frozen=True)
class Forget:
    """Let go of models and ControlNets `specs` and of tensors `names`, or of everything. Answer: None."""

    specs: tuple[ModelSpec | ControlNet, ...] | None = None
    names: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Status:
    """Answer: a dict that says what this rank holds and how much memory it has."""


@dataclass(frozen=True)
class Stop:
    """End the rank."""


# ------------------------------------------------------------------ ranks -> host


@dataclass(frozen=True)
class Ready:
    """A rank has joined its group. `report` says what it runs on."""

    report: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done; `preview` is the denoised latent, scaled, or None."""

    step: int
    steps: int
    preview: torch.Tensor | None = None


@dataclass(frozen=True)
class Result:
    """The answer of a rank. `seconds` is the time the rank worked.

    Of them `communication` went into exchanges with other ranks, waiting for them included (None: not
    measured), and `reporting` into words to the host.
    """

    value: Any
    seconds: float
    communication: float | None = 0.0
    reporting: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A rank raised. `invalid` says that the input was at fault and the rank is as before."""

    kind: str
    message: str
    traceback: str
    invalid: bool


@dataclass(frozen=True)
class Cancelled:
    """The rank stopped at a step boundary because the host asked for it."""

    step: int


ANSWERS = (Ready, Progress, Result, Failure, Cancelled)  # what ranks say
WORDS: dict[str, type] = {
    word.__name__: word
    for word in (
        Load, Check, CheckLora, CheckIPAdapter, Prove, Compare, Denoise, Preprocess, ImagePrompt, Keep, Known,
        Patch, PatchSet, Sample, EncodeText, Decode, Encode, Stop, Forget, Status, Ready, Progress, Result,
        Failure, Cancelled, ModelSpec, HostComfyUI, LoraFile, IPAdapterFile, ParallelConfig, ControlNet,
        AppliedControlNet,
    )
}  # fmt: skip
