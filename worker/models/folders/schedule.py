"""How a model samples, by the scheduler of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.sampling import TABLE_SIZES, Sampling

FLOW = "flow_prediction"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
EVEN_ROOTS = {"linear": False, "scaled_linear": True}


def sampling_of(words: Mapping[str, Any], file: Path) -> Sampling:
    """What a scheduler's configuration says of the model: the noise it knows, and what it predicts.

    Which steps a run takes, and by which formula, is the sampler's business.

    Args:
        words: the arguments of the scheduler's class.
        file: where they are from, for messages.

    Raises:
        InvalidInput: it was trained in a way that no sampler here knows.
    """
    steps = words.get("num_train_timesteps", TABLE_SIZES["discrete"])
    if steps != TABLE_SIZES["discrete"]:
        raise _unknown(file, "num_train_timesteps", steps, TABLE_SIZES["discrete"])
    prediction, schedule = words.get("prediction_type", FLOW), words.get("beta_schedule")
    if prediction not in (FLOW, *PREDICTIONS):
        raise _unknown(file, "prediction_type", prediction, ", ".join((FLOW, *PREDICTIONS)))
    if prediction == FLOW or words.get("use_flow_sigmas"):
        return Sampling("flow", shift=_shift(words), multiplier=float(steps))
    if schedule not in EVEN_ROOTS or words.get("trained_betas") is not None:
        raise _unknown(file, "beta_schedule", schedule, ", ".join(EVEN_ROOTS))
    return Sampling(
        "discrete",
        prediction=PREDICTIONS[prediction],
        betas=(float(words["beta_start"]), float(words["beta_end"])),
        even_roots=EVEN_ROOTS[schedule],
        snr_shift=float(words.get("snr_shift_scale", 1.0)),
        zero_snr=bool(words.get("rescale_betas_zero_snr", False)),
    )


def _shift(words: Mapping[str, Any]) -> float:
    """Of a flow. One that a pipeline takes by the size of the picture is that of large ones, as ComfyUI's."""
    if words.get("use_dynamic_shifting"):
        return math.exp(float(words["max_shift"]))
    return float(words.get("flow_shift", words.get("shift", 1.0)))


def _unknown(file: Path, name: str, value: Any, known: Any) -> InvalidInput:
    return InvalidInput(
        f"{file} says {name} {value!r}, and samplers here know {known}; choose another version of the model."
    )
