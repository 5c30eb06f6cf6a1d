"""What is to be loaded: frozen and hashable, so that the ranks can compare it with what they hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.regular_files import check_there

WEIGHT_DTYPES = ("default", "fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
SAMPLERS = ("euler", "heun", "dpmpp_2m")  # ComfyUI's names of those whose loop runs in the ranks
SCHEDULERS = (  # ComfyUI's names
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip
# The control types of FLUX.1's union ControlNets (InstantX, Shakker Labs), by their numbers.
CONTROL_TYPES = {
    "none": None, "canny (0)": 0, "tile (1)": 1, "depth (2)": 2, "blur (3)": 3, "pose (4)": 4, "gray (5)": 5,
    "low quality (6)": 6, "mode 7": 7, "mode 8": 8, "mode 9": 9,
}  # fmt: skip
STAMPED = (".safetensors", ".json", ".txt", ".model")  # what of a folder makes it another model
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)""", re.MULTILINE)
File = TypeVar("File", bound="AdapterFile")


@dataclass(frozen=True)
class HostComfyUI:
    """The ComfyUI that the host runs, for ranks that use its classes.

    Args:
        root: the folder its packages are imported from.
        version: as its `comfyui_version.py` says.
        switches: name and value of the command-line switches that are set and act on a transformer; a value
            is plain, or a tuple of names where the switch takes several.
    """

    root: str
    version: str
    switches: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def at(cls, root: Path) -> HostComfyUI:
        """The ComfyUI in a folder, as it starts without switches.

        Raises:
            InvalidInput: there is none.
        """
        root = root.resolve()
        version = comfyui_version(root)
        if version is None or not (root / "comfy").is_dir():
            raise InvalidInput(
                f"{root} is no ComfyUI: it has no folder comfy and no comfyui_version.py; name "
                "the folder that its main.py is in."
            )
        return cls(str(root), version)


def comfyui_version(root: Path) -> str | None:
    """What the files of a ComfyUI say; None where there is none."""
    file = root / "comfyui_version.py"
    said = _VERSION.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return said.group(1) if said else None


@dataclass(frozen=True)
class ModelSpec:
    """One diffusion model, text encoder set or VAE on disk.

    Args:
        path: a safetensors file, or a diffusers folder (one with a `config.json`, or a pipeline
            with a `model_index.json`).
        kind: "transformer", "text_encoders" or "vae".
        weight_dtype: one of WEIGHT_DTYPES; "default" is the file's dtype on a GPU, fp32 on CPU, or what
            ComfyUI chooses for its own classes. Those with fp8 are for its classes alone.
        stamp: size and modification time of the file or index: another file is another spec.
        comfyui: the host's, whose own class a transformer may have; None is diffusers' class.
        configuration: ComfyUI's name of the model, whose diffusers class is taken where the ranks have one;
            "" is ComfyUI's own class, whatever they have.
        checkpoint: it is a whole checkpoint, read as ComfyUI's checkpoint loader reads it: what stands around
            the transformer's weights counts too.
    """

    path: str
    kind: str
    weight_dtype: str = "default"
    stamp: tuple[int, int] = (0, 0)
    comfyui: HostComfyUI | None = None
    configuration: str = ""
    checkpoint: bool = False

    @classmethod
    def of(
        cls,
        path: str | Path,
        kind: str,
        weight_dtype: str = "default",
        comfyui: HostComfyUI | None = None,
        configuration: str = "",
        checkpoint: bool = False,
    ) -> ModelSpec:
        """Describe what is at `path` now.

        Raises:
            InvalidInput: neither a file nor a folder is there, or `weight_dtype` is unknown.
        """
        if weight_dtype not in WEIGHT_DTYPES:
            raise InvalidInput(
                f"weight_dtype {weight_dtype!r} is not one of {', '.join(WEIGHT_DTYPES)}; choose one of them."
            )
        if weight_dtype.startswith("fp8") and comfyui is None:
            raise InvalidInput(
                f"weight_dtype {weight_dtype} is for ComfyUI's own classes, and {Path(path).name} is loaded "
                "into diffusers' class; set weight_dtype to bf16, or load a single file inside ComfyUI."
            )
        path = Path(path)
        check_there(path, "a model that exists")
        stamp = _stamp(path)
        return cls(str(path.absolute()), kind, weight_dtype, stamp, comfyui, configuration, checkpoint)

    def check(self) -> None:
        """Raise InvalidInput if what is at the path is no longer what it was."""
        check_there(Path(self.path), "a model that exists")
        if _stamp(Path(self.path)) != self.stamp:
            raise InvalidInput(changed(self.path))


def changed(path: str) -> str:
    """What to say of a file that is another one than was named."""
    return f"{path} was changed after the node that loads it had run; run the workflow again."


def _stamp(path: Path) -> tuple[int, int]:
    files = [f for f in path.rglob("*.*") if f.suffix in STAMPED and f.is_file()] if path.is_dir() else [path]
    stats = [f.stat() for f in files]
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


@dataclass(frozen=True)
class AdapterFile:
    """A file on disk that adds to a model, and that the ranks read themselves.

    Args:
        path: absolute path of a safetensors file.
        stamp: its size in bytes and its modification time in ns: a changed file is another one.
    """

    path: str
    stamp: tuple[int, int]
    what: ClassVar[str] = "adapter"

    @classmethod
    def of(cls: type[File], path: str | Path) -> File:
        """Describe the file at `path` now.

        Raises:
            InvalidInput: it is no file.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise InvalidInput(f"no {cls.what} file at {path}; choose one that exists.")
        stat = path.stat()
        return cls(str(path), (stat.st_size, stat.st_mtime_ns))

    @property
    def name(self) -> str:
        """Its name without the folder, for messages."""
        return Path(self.path).name

    def check(self) -> None:
        """Raise InvalidInput if it is no longer the file it was."""
        if type(self).of(self.path) != self:
            raise InvalidInput(changed(self.path))


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet on disk, which the ranks read themselves.

    Args:
        path: absolute path of a safetensors file, or of a diffusers folder.
        stamp: size in bytes and modification time in ns of its files, and of a `config.json` beside it:
            a changed file is another ControlNet.
    """

    path: str
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: str | Path) -> ControlNet:
        """Describe what is at `path` now.

        Raises:
            InvalidInput: nothing is there.
        """
        path = Path(path).absolute()
        check_there(path, "a ControlNet that exists")
        files = sorted(path.glob("*.*")) if path.is_dir() else [path, path.parent / "config.json"]
        stats = [f.stat() for f in files if f.is_file()]
        return cls(str(path), (sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)))

    @property
    def name(self) -> str:
        """Its name for messages: without the folder, but for the general names that diffusers gives."""
        path = Path(self.path)
        return f"{path.parent.name}/{path.name}" if path.name.startswith("diffusion_pytorch") else path.name

    def check(self) -> None:
        """Raise InvalidInput if it is no longer what it was."""
        if ControlNet.of(self.path) != self:
            raise InvalidInput(changed(self.path))


@dataclass(frozen=True)
class LoraFile(AdapterFile):
    """A LoRA."""

    what: ClassVar[str] = "LoRA"


@dataclass(frozen=True)
class IPAdapterFile(AdapterFile):
    """An IP-Adapter: what makes a picture a prompt."""

    what: ClassVar[str] = "IP-Adapter"
