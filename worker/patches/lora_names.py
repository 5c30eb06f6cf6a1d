"""Which weight a tensor of a LoRA file is for, and as what part of which kind of change.

The same weight has many names: those of the original release (kohya's scripts, ComfyUI, Black Forest
Labs), those of diffusers (diffusers, PEFT, OneTrainer, SimpleTuner's LyCORIS), and XLabs'. All are made
from the family's own mapping of names. diffusers' converters are not used: they are written for one
width and depth, and for plain LoRA alone (diffusers.loaders.lora_conversion_utils).
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.checkpoints import Source

WRITTEN_WITH_DOTS = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
)
WRITTEN_WITH_UNDERSCORES = ("lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODERS = ("lora_te", "text_encoder", "te_", "te1_", "te2_", "conditioner.", "cond_stage_model.")
READ = (
    "kohya (lora_unet_...), diffusers and PEFT (transformer. ..., base_model.model. ...), ComfyUI "
    "(diffusion_model. ...), Black Forest Labs and XLabs (double_blocks. ...), OneTrainer "
    "(lora_transformer_...) and LyCORIS (lycoris_...)"
)

_UP_AND_DOWN = (
    (".lora_up.weight", ".lora_down.weight"),  # kohya
    ("_lora.up.weight", "_lora.down.weight"),  # diffusers before PEFT
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),  # PEFT, and so diffusers
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".up.weight", ".down.weight"),  # XLabs
)
# What a name ends with: (kind, part). The parts are those of messages.Patch.
ENDINGS: dict[str, tuple[str, str]] = {
    **{up: ("lora", "up") for up, _ in _UP_AND_DOWN},
    **{down: ("lora", "down") for _, down in _UP_AND_DOWN},
    ".lora_mid.weight": ("lora", "mid"),
    ".reshape_weight": ("lora", "reshape"),
    ".lora_magnitude_vector": ("lora", "magnitude"),
    ".lora_magnitude_vector.weight": ("lora", "magnitude"),
    ".lora_magnitude_vector.default.weight": ("lora", "magnitude"),
    **{f".hada_{part}": ("loha", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": ("lokr", part) for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": ("glora", part) for part in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": ("oft", "blocks"),
    ".rescale": ("oft", "rescale"),
    ".diff": ("diff", "value"),
    ".w_norm": ("diff", "value"),
    ".set_weight": ("set", "value"),
    ".diff_b": ("bias", "value"),
    ".b_norm": ("bias", "value"),
    ".lora_B.bias": ("bias", "value"),
    ".lora_B.default.bias": ("bias", "value"),
    ".alpha": ("", "alpha"),
    ".dora_scale": ("", "dora_scale"),
}


@dataclass(frozen=True)
class Place:
    """What a tensor of a file is: a part of a kind of change of a module, written as `written`."""

    written: str
    module: str
    kind: str
    part: str


class LoraNames:
    """The names that LoRA files give to the modules of one model.

    Args:
        native: where each tensor by diffusers name is in the original release's naming.
        further: weights under names of LoRA files only.
    """

    def __init__(self, native: dict[str, Source], further: dict[str, Source]):
        own = {source.key: Source(source.key) for source in native.values()}
        self._sources = {**native, **own, **further}
        self._modules = {name.removesuffix(".weight") for name in self._sources if not name.endswith(".bias")}
        self._flat = {module.replace(".", "_"): module for module in self._modules}

    def place(self, name: str) -> Place | None:
        """What the tensor `name` is, or None if it is for no weight of this model."""
        for ending, (kind, part) in ENDINGS.items():
            if name.endswith(ending):
                written = name.removesuffix(ending)
                module = self._module(written)
                if module is not None and (kind != "bias" or self.bias(module)):
                    return Place(written, module, kind, part)
        module = self._module(name)
        if module is not None and name.endswith(".scale"):  # BFL's files bring whole norms
            return Place(name, module, "set", "value")
        return None

    def weight(self, module: str) -> Source:
        """Where the weight of a module is in the original release's naming."""
        return self._sources.get(f"{module}.weight") or self._sources[module]

    def bias(self, module: str) -> Source | None:
        """Likewise its bias, if it has one."""
        return self._sources.get(f"{module}.bias")

    def _module(self, written: str) -> str | None:
        for prefix in WRITTEN_WITH_UNDERSCORES:
            if written.startswith(prefix):
                return self._flat.get(written.removeprefix(prefix))
        while prefix := next((p for p in WRITTEN_WITH_DOTS if written.startswith(p)), None):
            written = written.removeprefix(prefix)
        written = written.replace(".processor.to_", ".to_")
        return written if written in self._modules else None
