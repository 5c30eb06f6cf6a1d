"""Latencies others published, as numbers in text, that the planner's model is fitted to and checked on.

Every series is one model, size and machine. `one` is its one-device time: it fixes the speed of the
device in that series (software, clocks, and what else is in the time), so that what is predicted
are the times on several devices. Rows marked as calibration are those the constants were fitted to.
A series without `one` was published as speed-ups; the device's table speed stands in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy_xdit.planning.prediction import EAGER, Constants
from comfy_xdit.planning.published import PUBLISHED
from comfy_xdit.planning.request import ModelShape, Request
from comfy_xdit.protocol.parallel import ParallelConfig

# torch.compile fuses what is between the products and launches whole graphs.
COMPILED = replace(EAGER, passes=10.0, launch=0.2e-3, launch_split=0.1e-3, launch_ring=0.05e-3)


def layout(name: str) -> ParallelConfig:
    """U2R2, CFG2xR3 and so on, as a layout; PF has the one warm-up step of the papers."""
    names = {
        "U": "ulysses_degree",
        "R": "ring_degree",
        "PF": "pipefusion_degree",
        "CFG": "cfg_parallel_degree",
    }
    degrees: dict[str, int] = {}
    for factor in name.split("x"):
        kind = factor.rstrip("0123456789")
        degrees[names[kind]] = int(factor.removeprefix(kind))
    return ParallelConfig(**degrees)


@dataclass(frozen=True)
class Series:
    """`rows` maps a layout to seconds, or to its speed-up where `one` is None."""

    name: str
    source: str
    request: Request
    devices: str
    one: float | None
    rows: dict[str, float]
    calibration: tuple[str, ...] = ()
    constants: Constants = EAGER
    outside: float = 0.0  # seconds of `one` and of every row that the ranks do not share (VAE)


def _video(name: str, heads: int, width: int, blocks: int, billions: float, cfg: bool) -> ModelShape:
    return ModelShape(name, heads, width, blocks, int(billions * 1e9), cfg)


HUNYUAN = _video("HunyuanVideo", 24, 3072, 60, 12.8, cfg=False)
STEP = _video("Step-Video", 48, 6144, 48, 30, cfg=True)
MOCHI = _video("Mochi", 24, 3072, 48, 10, cfg=True)
CONSISID = _video("ConsisID", 48, 3072, 42, 5.6, cfg=True)
PIXART = replace(_video("PixArt", 16, 1152, 28, 0.6, cfg=True), products=14.0)  # and a cross-attention
HUNYUAN_VAE = 100.0  # seconds outside the loop, so that U8 on H100 is right
FLUX_1024 = Request.picture(PUBLISHED["flux"], steps=28)
HUNYUAN_720 = Request(HUNYUAN, 33 * 45 * 80, 256, 50)
HUNYUAN_960 = Request(HUNYUAN, 33 * 60 * 60, 256, 50)
FLUX_MD, HUNYUAN_MD = "xDiT docs/performance/flux.md", "xDiT docs/performance/hunyuanvideo.md"
PIPEFUSION = "arXiv 2405.14430 §4.1"


def _hunyuan(device: str, one: float, rows: dict[str, float], size: str, fit: tuple[str, ...] = ()) -> Series:
    request = HUNYUAN_720 if size == "1280x720" else HUNYUAN_960
    devices, name = f"8 x {device}", f"HunyuanVideo {size}, {device}"
    return Series(name, HUNYUAN_MD, request, devices, one, rows, fit, outside=HUNYUAN_VAE)


def _pixart(pixels: int, **rows: float) -> Series:
    request = Request(PIXART, (pixels // 16) ** 2, 0, 20, cfg=True)
    return Series(f"PixArt {pixels}, L40 PCIe", PIPEFUSION, request, "8 x L40 PCIe", None, rows)


SERIES = (
    Series(
        "Flux dev 1024 eager, H100", FLUX_MD, FLUX_1024, "4 x H100 NVLink", 6.71,
        {"U2": 4.38, "R2": 5.31, "U4": 4.24, "R4": 5.11, "U2xR2": 5.19}, ("U4", "R4"),
    ),
    Series(
        "Flux dev 1024 compiled, H100", FLUX_MD, FLUX_1024, "4 x H100 NVLink", 4.30,
        {"U2": 2.68, "R2": 2.60, "U4": 1.63, "R4": 1.98, "U2xR2": 1.80}, ("U2", "R4"), COMPILED,
    ),
    Series("Flux 1024 compiled, H20", FLUX_MD, FLUX_1024, "4 x H20", 5.02, {"U4": 1.81}, (), COMPILED),
    Series(
        "Flux dev 1024 50 steps, H100", "cache-dit NVIDIA_GPU.md", replace(FLUX_1024, steps=50),
        "2 x H100", 9.30, {"U2": 6.04},
    ),
    Series(
        "Flux dev 1024, L20 PCIe", "cache-dit CONTEXT_PARALLEL.md", FLUX_1024, "4 x L20 PCIe", 23.56,
        {"U2": 13.80, "U4": 8.28}, ("U2",),
    ),
    Series(
        "Flux dev 1024, L40 PCIe", PIPEFUSION, FLUX_1024, "8 x L40 PCIe", None,
        {"PF8": 3.42, "U4xR2": 3.42 / 1.23}, ("PF8", "U4xR2"),
    ),
    Series(
        "Flux dev 2048, L40 PCIe", PIPEFUSION, Request.picture(PUBLISHED["flux"], 2048, 2048, steps=28),
        "8 x L40 PCIe", None, {"PF8": 5.79, "U4xR2": 5.79 / 1.25},
    ),
    _pixart(1024, CFG2xPF4=5.09),
    _pixart(2048, CFG2xPF4=7.91),
    _pixart(4096, CFG2xPF4=8.59),
    Series(
        "SD3 medium 1024, L40 PCIe", PIPEFUSION, Request.picture(PUBLISHED["sd3"], steps=20),
        "8 x L40 PCIe", None, {"CFG2xPF4": 3.11},
    ),
    Series(
        "SD3 medium 2048, L40 PCIe", PIPEFUSION, Request.picture(PUBLISHED["sd3"], 2048, 2048, steps=20),
        "8 x L40 PCIe", None, {"CFG2xPF4": 8.16},
    ),
    _hunyuan("H100", 1904.08, {"U2": 925.04, "U4": 514.08, "U8": 337.58}, "1280x720", ("U8",)),
    _hunyuan("H20", 6639.17, {"U2": 3400.55, "U4": 1762.86, "U8": 940.97}, "1280x720"),
    _hunyuan("L20", 6043.88, {"U2": 3271.44, "U4": 2080.05}, "1280x720"),
    _hunyuan("H100", 1735.01, {"U2": 934.09, "U3": 645.45, "U6": 367.02}, "960x960"),
    _hunyuan("H20", 6621.46, {"U2": 3400.55, "U3": 2310.48, "U6": 1214.67}, "960x960"),
    _hunyuan("L20", 6039.08, {"U2": 3260.62, "U3": 2284.74}, "960x960"),
    Series(
        "Step-Video 30B, H20", "xDiT docs/performance/stepvideo.md",
        Request(STEP, 36 * 34 * 62, 320, 1, cfg=True),
        "8 x H20 NVLink", 213.60, {"U2": 108.13, "U4": 57.01, "U8": 30.10},
    ),
    Series(
        "Mochi 49 frames 848x480, L40", "mochi-xdit README", Request(MOCHI, 9 * 30 * 53, 256, 64, cfg=True),
        "8 x L40 PCIe", 394.0, {"U2": 222.0, "CFG2": 198.0, "CFG2xR3": 74.0},
    ),
    Series(
        "ConsisID 49 frames 720x480, H100", "xDiT docs/performance/consisid.md",
        Request(CONSISID, 13 * 30 * 45, 226, 50, cfg=True), "8 x H100", 114.87,
        {
            "U2": 76.56, "R2": 70.19, "CFG2": 59.72, "U3": 53.57, "R3": 55.51, "CFG2xU2": 41.37,
            "CFG2xR2": 40.68, "U2xR3": 44.89, "U3xR2": 44.24, "CFG2xR3": 35.78, "CFG2xU3": 38.35,
        },
    ),
)  # fmt: skip


FLUX_SEQUENCE = {2: ("U2", "R2"), 4: ("U4", "R4", "U2xR2"), 8: ("U8", "R8", "U4xR2", "U2xR4")}


@dataclass(frozen=True)
class Claim:
    """What a source says of a figure without numbers: `faster` takes less time than each of `slower`."""

    text: str
    source: str
    request: Request
    faster: tuple[str, str]  # layout, devices
    slower: tuple[tuple[str, str], ...]
    constants: Constants = EAGER


def _claims(
    text: str, source: str, request: Request, best: str, others: tuple[str, ...], devices: str, **more
) -> Claim:
    rest = tuple((other, devices) for other in others if other != best)
    return Claim(text, source, request, (best, devices), rest, **more)


L40, A100 = "8 x L40 PCIe", "8 x A100 NVLink"
FLUX_2048 = Request.picture(PUBLISHED["flux"], 2048, 2048, steps=28)
SD3_1024, SD3_2048 = (Request.picture(PUBLISHED["sd3"], n, n, steps=20) for n in (1024, 2048))
PIXART_2048 = Request(PIXART, 128**2, 0, 20, cfg=True)
COGVIDEO = replace(
    Request(_video("CogVideoX1.5", 48, 3072, 42, 5.6, cfg=True), 21 * 48 * 85, 226, 50), cfg=True
)
SINGLE = ("PF8", "R8", "U8")
CLAIMS = (
    _claims("PipeFusion is the fastest single method", PIPEFUSION, PIXART_2048, "PF8", SINGLE, L40),
    _claims("Ulysses over 8 is slower than Ring", PIPEFUSION, PIXART_2048, "R8", ("U8",), L40),
    _claims("U2 x R4 is faster than Ring", PIPEFUSION, PIXART_2048, "U2xR4", ("R8",), L40),
    _claims("CFG2 x PF4 is the fastest", PIPEFUSION, PIXART_2048, "CFG2xPF4", ("CFG2xU4", *SINGLE), L40),
    _claims("the best sequence split is U4 x R2", PIPEFUSION, FLUX_1024, "U4xR2", FLUX_SEQUENCE[8], L40),
    _claims("the best sequence split is U4 x R2", PIPEFUSION, FLUX_2048, "U4xR2", FLUX_SEQUENCE[8], L40),
    _claims("the best sequence split is U4 x R2", PIPEFUSION, SD3_1024, "U4xR2", FLUX_SEQUENCE[8], L40),
    _claims("the best sequence split is U4 x R2", PIPEFUSION, SD3_2048, "U4xR2", FLUX_SEQUENCE[8], L40),
    _claims(
        "U2 x R2 is the best over 4", FLUX_MD, replace(FLUX_1024, steps=4), "U2xR2", FLUX_SEQUENCE[4],
        "4 x L40 PCIe", constants=COMPILED,
    ),
    Claim(
        "8 GPUs are slower than 4", FLUX_MD, replace(FLUX_1024, steps=4), ("U2xR2", L40),
        tuple((name, L40) for name in FLUX_SEQUENCE[8]), COMPILED,
    ),
    Claim(
        "8 GPUs are faster than 4", FLUX_MD, replace(FLUX_2048, steps=4), ("U4xR2", L40),
        tuple((name, L40) for name in FLUX_SEQUENCE[4]), COMPILED,
    ),
    _claims("Ulysses is the best", FLUX_MD, FLUX_1024, "U8", FLUX_SEQUENCE[8], A100),
    _claims("Ulysses is the best", FLUX_MD, FLUX_2048, "U8", FLUX_SEQUENCE[8], A100),
    Claim(
        "16 GPUs (U4 x PF4) are faster than 8", FLUX_MD, FLUX_1024, ("U4xPF4", "2 x 8 L40 Ethernet"),
        tuple((name, L40) for name in ("PF8", *FLUX_SEQUENCE[8])),
    ),
    _claims(
        "a sequence split over both machines is slower", FLUX_MD, FLUX_1024, "U4xPF4",
        ("U8xR2", "U4xR4", "R16"), "2 x 8 L40 Ethernet",
    ),
    _claims(
        "CFG is the best over 2", "xDiT docs/performance/cogvideo.md", COGVIDEO, "CFG2", ("U2", "R2"), L40
    ),
    _claims(
        "CFG2 x U2 x R2 is the best over 8", "xDiT docs/performance/cogvideo.md", COGVIDEO, "CFG2xU2xR2",
        ("CFG2xU4", "CFG2xR4", *FLUX_SEQUENCE[8]), L40,
    ),
)  # fmt: skip
