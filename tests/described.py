"""A model that the ranks might describe, for tests that need no rank."""

from comfy_xdit.protocol.description import LatentSpace, ModelDescription, PromptPart
from comfy_xdit.protocol.sampling import Sampling

DESCRIBED = ModelDescription(
    family="anything",
    comfyui=False,
    latent=LatentSpace(4, compression=8, patch=(4, 4)),
    sampling=Sampling("flow", 3.0, 1000.0),
    prompt=(PromptPart("context"), PromptPart("y", "pooled_output")),
    guided=True,
    rows_apart=True,
    heads=4,
    width=256,
    blocks=3,
    dual=2,
    streams=("image", "text"),
    text_tokens=77,
    products=14.0,
    parameters=10,
    stored="float32",
    dtype="float32",
)
