"""The environment a rank starts with: built from a list of what it needs, never inherited whole.

ComfyUI sets `PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync`, which makes ranks run out of memory
under NCCL; schedulers set MASTER_PORT, RANK and OMP_NUM_THREADS. None of that may leak in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from comfy_xdit import ROOT
from comfy_xdit.protocol.parallel import rank_threads

PASSED_ON = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SYSTEMROOT"),
        *("CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_ORDER", "ROCM_PATH", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"),
    )
)
PASSED_ON_PREFIXES = (
    "LC_",
    "NCCL_",
    "NVIDIA_",
    "ROCR_",
    "HSA_",
    "XDIT_",
    "TRITON_",
    "TORCHINDUCTOR_",
    "HF_HOME",
)
VISIBLE = "CUDA_VISIBLE_DEVICES"
# What a rank that is forked is given then: it differs between ranks, or is read when it is needed.
_PER_RANK = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
_READ_BY_IMPORTS = "XDIT_LOGGING_LEVEL"


def rank_environment(
    rank: int, devices: tuple[str, ...], host: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment of the process of `rank`, which sees exactly its own device.

    Args:
        devices: one device per rank, as the host numbers them.
        host: the host's environment; its `CUDA_VISIBLE_DEVICES` is honoured.
    """
    host = os.environ if host is None else host
    environment = {
        name: value
        for name, value in host.items()
        if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    inherited = host.get("PYTHONPATH")
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # each rank sees one device, which therefore is number 0
        "WORLD_SIZE": str(len(devices)),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(rank_threads(len(devices))),
        "HF_HUB_OFFLINE": "1",  # a checkpoint is a file of this machine: no rank asks a hub
        "TRANSFORMERS_OFFLINE": "1",
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "XDIT_LOGGING_LEVEL": host.get("XDIT_LOGGING_LEVEL", "ERROR"),
        "LOG_LEVEL": host.get("XDIT_LOGGING_LEVEL", "ERROR"),  # the name that xfuser's logger reads
        "TORCH_CPP_LOG_LEVEL": host.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # A rank's log is read when it has died: what libraries deprecate would hide why.
        "PYTHONWARNINGS": "ignore",
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves its Python stack
        VISIBLE: visible(devices[rank], host.get(VISIBLE)),
    }
    return environment


def template_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Of a rank's environment what the process it is forked from must have had from its start."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _PER_RANK
        and (name == _READ_BY_IMPORTS or not name.startswith("XDIT_"))
        and (name != VISIBLE or not value)
    }


def visible(device: str, allowed: str | None) -> str:
    """The physical device behind the host's `device`: "cuda:1" of "4,5" is "5"."""
    if not device.startswith("cuda:"):
        return ""
    index = int(device.removeprefix("cuda:"))
    return allowed.split(",")[index].strip() if allowed else str(index)
