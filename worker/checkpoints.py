"""Weights on disk: headers first, tensors by name and slice afterwards. safetensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.quantised import MARKS, refuse_foreign
from comfy_xdit.protocol.regular_files import open_regular
from comfy_xdit.protocol.safetensors_header import PICKLES, how_to_convert, read_header

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
BATCH = 16 << 20  # numbers that are copied out of a file before it is closed and opened anew
FEW = 16  # numbers beside a model that say something of it
MAX_JSON_BYTES = 16 << 20  # of a configuration; published ones have some kilobytes
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what a weight may be stored as
Shapes = dict[str, tuple[int, ...]]
Dtype = torch.dtype | Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from: rows `start` to `stop` of `key` in the file.

    `swap` exchanges the halves: Stability and BFL store (shift, scale), diffusers (scale, shift).
    """

    key: str
    start: int | None = None
    stop: int | None = None
    swap: bool = False


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a tensor, counted through its rows."""

    source: Source
    start: int
    stop: int


class Checkpoint:
    """One or several safetensors files read as one, without the prefix a full checkpoint adds.

    Args:
        quantised: layers in a format of their own are read as they are stored, instead of refused.
        transformer: where there are tensors with such a prefix, they are all of it that counts.
    """

    def __init__(self, files: Iterable[Path], quantised: bool = False, transformer: bool = False):
        self._files = list(files)
        self._place: dict[str, tuple[Path, str]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._left_out: Shapes = {}  # by their names in the file
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        for file in self._files:
            self._add(file)
        if transformer:
            self._leave_out_others()
        refuse_foreign(self._place, self._files[0].name)
        marks = [k for k in self._place if k.endswith(MARKS)]
        if marks and not quantised:
            raise InvalidInput(
                f"{self._files[0].name} holds quantised weights ({marks[0]}), which this version does "
                "not read; choose the fp16, bf16 or plain fp8 file of the model."
            )

    @classmethod
    def at(cls, path: Path, transformer: bool = False) -> Checkpoint:
        """The checkpoint at a file, or in a diffusers model folder; or its transformer alone.

        Raises:
            InvalidInput: nothing there, a pickle file, a damaged file, or two with the same tensor.
        """
        if not path.is_dir():
            return cls([path], transformer=transformer)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickles = [f.name for f in path.glob("*") if f.suffix in PICKLES]
            hint = f"it holds {pickles[0]}: {how_to_convert()}" if pickles else "choose one that has some."
            raise InvalidInput(f"no .safetensors file in {path}; {hint}")
        plain = [f for f in files if ".fp16." not in f.name and ".bf16." not in f.name]
        return cls(plain or files, transformer=transformer)

    @property
    def elements(self) -> int:
        """How many numbers the files hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def tensors(
        self, mapping: dict[str, Source], dtype: Dtype, device: torch.device | None = None
    ) -> dict[str, torch.Tensor]:
        """Read every mapped tensor as `dtype`. Slices are read, not whole tensors.

        Args:
            dtype: one for all, or of each.
            device: where they are to stay, as copies. None: on CPU and maybe as views of the file, which
                change with it, and which it must not be cut off under: to be used at once.
        """
        return dict(self.stream(mapping, dtype, device))

    def stream(
        self, mapping: dict[str, Source], dtype: Dtype, device: torch.device | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `tensors`, one after the other in the order of `mapping`.

        Raises:
            InvalidInput: a file is no longer the one whose header was read.
        """
        for some in [mapping] if device is None else self._batches(mapping):
            with self._opened() as opened:
                for name, source in some.items():
                    file, key = self._place[source.key]
                    tensor = _read(opened[file], key, source)
                    wanted = dtype if isinstance(dtype, torch.dtype) else dtype[name]
                    yield name, tensor.to(device or "cpu", wanted, copy=device is not None)

    def views(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Every tensor under its name in the file, as a view of the file's memory map; and the metadata.

        Of what stands around a transformer a few numbers are as they are, and larger tensors are zeros that
        take no memory: a view reads the file where its tensor begins.

        Raises:
            InvalidInput: a file is no longer the one whose header was read.
        """
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, str] = {}
        with self._opened() as opened:
            for stored in opened.values():
                for key in stored.keys():  # noqa: SIM118 - not a dict
                    shape = self._left_out.get(key, ())
                    large = math.prod(shape) > FEW
                    tensors[key] = torch.zeros(()).expand(shape) if large else stored.get_tensor(key)
                metadata |= stored.metadata() or {}
        return tensors, metadata

    def parts(self, wanted: dict[str, Part]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parts of tensors as they are stored, each as one row of elements. Only their rows are read."""
        with self._opened() as opened:
            for name, part in wanted.items():
                file, key = self._place[part.source.key]
                yield name, _read_part(opened[file], key, part)

    def not_finite(self, keys: Iterable[str], dtype: torch.dtype) -> str | None:
        """The first of these tensors that holds a NaN or an infinity as `dtype`; reads them whole.

        For when something was found: it takes as long as loading.
        """
        wanted = {key: Source(key) for key in dict.fromkeys(keys) if self.dtypes[key] in FLOATS}
        return next((key for key, t in self.stream(wanted, dtype) if not torch.isfinite(t).all()), None)

    def _batches(self, mapping: dict[str, Source]) -> Iterator[dict[str, Source]]:
        """Parts of `mapping`: what was read of a file counts as memory until the file is closed."""
        batch, size = {}, 0
        for name, source in mapping.items():
            batch[name] = source
            size += math.prod(self.shapes[source.key])
            if size >= BATCH:
                yield batch
                batch, size = {}, 0
        yield batch

    def check_unchanged(self) -> None:
        """Raise InvalidInput if a file is no longer the one whose header was read."""
        for file, stamp in self._stamps.items():
            if not file.exists() or _stamp(file) != stamp:
                raise InvalidInput(
                    f"{file} was changed or removed after it was loaded; run the loader node again."
                )

    @contextmanager
    def _opened(self) -> Iterator[dict[Path, safe_open]]:
        self.check_unchanged()
        with ExitStack() as stack:
            opened = {}
            for file in self._files:
                try:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise InvalidInput(f"{file} cannot be read: {error}; download it again.") from error
            yield opened
        self.check_unchanged()  # half of one file and half of another is neither

    def common_dtype(self) -> torch.dtype:
        """The dtype most tensors have."""
        counts: dict[str, int] = {}
        for name in self.dtypes.values():
            counts[name] = counts.get(name, 0) + 1
        return _DTYPES.get(max(counts, key=counts.get), torch.float32)

    def _add(self, file: Path) -> None:
        """Read a file's header. Whether the file is changed later, `_opened` asks."""
        stored = read_header(file)  # which finds out first whether it is a file
        self._stamps[file] = _stamp(file)
        for key, tensor in stored.items():
            name = _without_prefix(key)
            if name in self._place:
                other, twin = self._place[name]
                where = f"as {twin} and as {key}" if other == file else f"in {other.name} and in {file.name}"
                raise InvalidInput(
                    f"{file.parent if other != file else file.name} has the tensor {name} twice, {where}; "
                    "remove the one that does not belong to the model."
                )
            self._place[name] = (file, key)
            self.shapes[name], self.dtypes[name] = tensor.shape, tensor.dtype

    def _leave_out_others(self) -> None:
        """Forget text encoders and VAE of a whole checkpoint."""
        others = {name: key for name, (_, key) in self._place.items() if not key.startswith(PREFIXES)}
        if len(others) < len(self._place):
            self._left_out = {key: self.shapes[name] for name, key in others.items()}
            for name in others:
                del self._place[name], self.shapes[name], self.dtypes[name]


def check_complete(
    module: torch.nn.Module, mapping: dict[str, Source], checkpoint: Checkpoint, path: str
) -> None:
    """Raise InvalidInput unless every tensor of `module` is in the file: numbers, in the right shape."""
    for name, wanted in module.state_dict().items():
        source = mapping.get(name)
        if source is None or source.key not in checkpoint.shapes:
            raise InvalidInput(
                f"{path} lacks the tensor {source.key if source else name}; the file is incomplete: download "
                "it again."
            )
        shape = checkpoint.shapes[source.key]
        if source.start is not None:
            shape = (max(0, min(source.stop, shape[0]) - source.start), *shape[1:]) if shape else shape
        if tuple(wanted.shape) != shape:
            raise InvalidInput(
                f"{path}: {source.key} has shape {shape}, the model needs {tuple(wanted.shape)}; the file is "
                "damaged or of a variant this version does not know: download it again, or choose another."
            )
        check_dtype(checkpoint, source.key, path)


def check_dtype(checkpoint: Checkpoint, key: str, path: str) -> None:
    """Raise InvalidInput unless the weight at `key` holds floating-point numbers that ranks compute with."""
    dtype = checkpoint.dtypes[key]
    if dtype not in FLOATS:
        raise InvalidInput(
            f"{path}: {key} holds {dtype} numbers, which are no weights (those are {', '.join(FLOATS)}); the "
            "file is damaged or quantised: choose its fp16, bf16 or plain fp8 version."
        )


def not_finite(checkpoint: Checkpoint, keys: Iterable[str], dtype: torch.dtype, path: str) -> InvalidInput:
    """What to say of a model that computed values which are not finite: whose fault it is."""
    key = checkpoint.not_finite(keys, dtype)
    if key is None:
        return InvalidInput(
            f"{path} computed values that are not finite (NaN or infinity), and its weights are finite in "
            f"{_name(dtype)}: look at what it was given (prompt, LoRA, ControlNet, picture), or set "
            "weight_dtype to fp32."
        )
    return InvalidInput(
        f"{path}: {key} holds values that are not finite in {_name(dtype)} (NaN or infinity); the file is "
        "damaged or needs another weight_dtype: download it again, or set weight_dtype to fp32."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from disk. Raises InvalidInput when it is missing, damaged or no such thing."""
    if not file.exists():
        raise InvalidInput(f"{file} is missing; choose a complete diffusers folder.")
    with open_regular(file, "a complete diffusers folder") as (stream, size):
        if size > MAX_JSON_BYTES:
            raise InvalidInput(
                f"{file} has {size:,} bytes, a configuration at most {MAX_JSON_BYTES:,}; choose a complete "
                "diffusers folder."
            )
        text = stream.read(MAX_JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file} is damaged: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{file} is damaged: it holds no JSON object; download it again.")
    return content


_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,  # a storage format: computed in bf16
    "F8_E5M2": torch.bfloat16,
}


def _read(opened: safe_open, key: str, source: Source) -> torch.Tensor:
    if source.start is not None:
        return opened.get_slice(key)[source.start : source.stop]
    tensor = opened.get_tensor(key)
    if source.swap:
        first, second = tensor.chunk(2)
        return torch.cat([second, first])
    return tensor


def _read_part(opened: safe_open, key: str, part: Part) -> torch.Tensor:
    stored, source = opened.get_slice(key), part.source
    rows, *rest = stored.get_shape()
    first, last = source.start or 0, rows if source.stop is None else source.stop
    width, half = math.prod(rest), (last - first) // 2
    spans = [(part.start, part.stop, first)]  # elements, and the file's row that they are counted from
    if source.swap:
        middle = half * width  # before it the second half of the file's rows, behind it the first
        spans = [
            (min(part.start, middle), min(part.stop, middle), last - half),
            (max(part.start, middle), max(part.stop, middle), first - half),
        ]
    pieces = []
    for start, stop, base in spans:
        if start < stop:
            top = start // width
            lines = stored[base + top : base - (-stop // width)]
            pieces.append(lines.reshape(-1)[start - top * width : stop - top * width])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _without_prefix(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
