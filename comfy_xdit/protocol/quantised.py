"""By what a quantised model is told: those that ComfyUI reads, and those that nothing here reads."""

from __future__ import annotations

from collections.abc import Iterable

from comfy_xdit.protocol.errors import InvalidInput

# How names end that are in ComfyUI's own formats alone: scaled fp8, mixed precision.
MARKS = ("scaled_fp8", ".comfy_quant", ".scale_weight", ".weight_scale")
# Formats of other programs, and how names end that are in these alone.
_FOREIGN = {
    "nunchaku (SVDQuant int4 or fp4)": (".wscales", ".wtscale", ".smooth_factor", ".smooth_factor_orig"),
    "bitsandbytes (nf4, fp4 or int8)": (
        ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax", ".quant_map", ".SCB",
    ),
    "GPTQ or AWQ (int4)": (".qzeros",),
    "optimum-quanto": (".weight._data", ".weight._scale"),
}  # fmt: skip


def refuse_foreign(names: Iterable[str], file: str) -> None:
    """Raise InvalidInput for a file in a format of another program; `names` are those of its tensors."""
    for name in names:
        for program, endings in _FOREIGN.items():
            if name.endswith(endings):
                raise InvalidInput(
                    f"{file} is quantised by {program} ({name}), which only that program reads; choose a "
                    "file of the model in GGUF, in fp8, or in bf16 or fp16."
                )
