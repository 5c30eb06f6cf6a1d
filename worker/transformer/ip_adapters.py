"""IP-Adapters of a loaded transformer: their files, their weights, and where they are at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.spec import IPAdapterFile
from worker.checkpoints import Checkpoint, Source, check_dtype
from worker.models import IMAGE_OUTPUTS, Acting, IPAdapter, ModelFamily
from worker.parallel import Attend, SpreadTokens, scaled_dot_product_attention
from worker.transformer.batch import Pictures

FORMATS = (
    "XLabs' for FLUX.1 (double_blocks.0.processor.ip_adapter_...), InstantX' for SD3 (image_proj.latents)"
)
KEPT_HEADERS = 8  # of files that were checked and not loaded


@dataclass(frozen=True)
class Opened:
    """A file whose header was read: the adapter without weights, and where they are."""

    module: IPAdapter
    checkpoint: Checkpoint
    sources: dict[str, str]


class IPAdapters:
    """Reads IP-Adapter files for one transformer and keeps their weights, as long as it is kept itself.

    Args:
        family, config: what the transformer is.
        dtype, device: what to compute in, and where.
    """

    def __init__(self, family: ModelFamily, config: dict[str, Any], dtype: torch.dtype, device: torch.device):
        self._family, self._config, self._dtype, self._device = family, config, dtype, device
        self._opened: dict[IPAdapterFile, Opened] = {}
        self._loaded: dict[IPAdapterFile, IPAdapter] = {}
        self._acting: list[Acting] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that are in memory."""
        return sum(self._bytes(module) for module in self._loaded.values())

    def check(self, file: IPAdapterFile, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The answer to CheckIPAdapter.

        Raises:
            InvalidInput: the file is damaged or none for this model, or it takes something else than an
                encoded picture of these shapes.
        """
        adapter = self._adapter(file)
        takes = adapter.takes
        if takes not in shapes:
            raise InvalidInput(
                f"{file.name} takes {takes}, and clip_vision_output has {', '.join(shapes) or 'nothing'}; "
                "connect the output of CLIP Vision Encode."
            )
        self.check_embeds(file, shapes[takes])
        return {"embeds": takes, "blocks": adapter.places}

    def check_embeds(self, file: IPAdapterFile, shape: tuple[int, ...]) -> None:
        """Raise InvalidInput where the adapter does not take an encoded picture of this shape."""
        adapter = self._adapter(file)
        dims = IMAGE_OUTPUTS[adapter.takes]
        if len(shape) != dims or 0 in shape or shape[-1] != adapter.width:
            wanted = f"(pictures, {'tokens, ' * (dims - 2)}{adapter.width})"
            raise InvalidInput(
                f"{adapter.takes} of the encoded picture has shape {tuple(shape)}, {file.name} takes "
                f"{wanted}; encode it with the CLIP Vision model that this adapter was made with (mostly "
                f"{adapter.encoder})."
            )
        if adapter.most_pictures and shape[0] > adapter.most_pictures:
            raise InvalidInput(
                f"{shape[0]} pictures were encoded at once, {file.name} takes {adapter.most_pictures}; "
                "encode each of them alone, and add it with an 'xDiT IP-Adapter Apply' node of its own."
            )

    def missing_bytes(self, files: Iterable[IPAdapterFile]) -> int:
        """Bytes of those that `load` would read."""
        return sum(self._bytes(self._adapter(file)) for file in files if file not in self._loaded)

    def drop_all_but(self, files: Iterable[IPAdapterFile]) -> None:
        """Let go of what others need."""
        kept = set(files)
        self._loaded = {file: module for file, module in self._loaded.items() if file in kept}

    def load(self, files: Iterable[IPAdapterFile]) -> None:
        """Read what is not in memory yet.

        Raises:
            InvalidInput: a file is no longer the one whose header was read.
        """
        for file in files:
            if file in self._loaded:
                continue
            opened = self._opened.pop(file, None) or self._read_header(file)
            sources = {name: Source(key) for name, key in opened.sources.items()}
            tensors = opened.checkpoint.tensors(sources, self._dtype, self._device)
            opened.module.load_state_dict(tensors, assign=True)
            self._loaded[file] = opened.module.to(self._device).eval().requires_grad_(False)

    def attach(self, transformer: nn.Module, tokens: SpreadTokens | None) -> None:
        """Have the adapters act on the loaded transformer, whose tokens may be spread over ranks."""
        spread = tokens and tokens.exchange.module((Attend("image", "image *"),))
        attend = spread.attend if spread else _one_device

        def attention(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            more_key: torch.Tensor,
            more_value: torch.Tensor,
        ) -> torch.Tensor:
            """Image tokens, of which a rank may have its part, and more keys, which every rank has whole."""
            keys, values = torch.cat([key, more_key], 2), torch.cat([value, more_value], 2)
            return attend(query, keys, values, None, None, scaled_dot_product_attention)

        if self._family.ip_adapter is not None:
            self._family.ip_adapter.attach(transformer, self._acting, attention)

    @contextmanager
    def of(self, pictures: Pictures | None, timestep: torch.Tensor) -> Iterator[None]:
        """Within, the transformer is called with these pictures; `timestep` is (B,), as it gets it."""
        if pictures is not None:
            self._acting[:] = [
                self._loaded[p.file].act(
                    _rows(p.embeds.to(self._dtype), pictures.negative), timestep, p.weight
                )
                for p in pictures.prompts
            ]
        try:
            yield
        finally:
            self._acting.clear()

    def _adapter(self, file: IPAdapterFile) -> IPAdapter:
        """With or without weights."""
        if file in self._loaded:
            return self._loaded[file]
        if file not in self._opened:
            self._opened[file] = self._read_header(file)
            for oldest in list(self._opened)[:-KEPT_HEADERS]:
                del self._opened[oldest]
        return self._opened[file].module

    def _read_header(self, file: IPAdapterFile) -> Opened:
        file.check()
        checkpoint = Checkpoint([Path(file.path)])
        shapes, adapter = checkpoint.shapes, self._family.ip_adapter
        sources = adapter.sources(shapes) if adapter is not None else {}
        if not sources:
            some = ", ".join(sorted(shapes)[:3]) or "nothing"
            raise InvalidInput(
                f"{file.name} is no IP-Adapter for {self._family.name}: its {len(shapes)} tensors begin with "
                f"{some}. Formats that are read: {FORMATS}; choose one made for this model."
            )
        try:
            with init_empty_weights():
                module = adapter({name: shapes[key] for name, key in sources.items()}, self._config)
        except KeyError as error:
            raise InvalidInput(
                f"{file.name} lacks {error}, which an IP-Adapter for {self._family.name} has; choose a "
                "complete file."
            ) from error
        except (IndexError, ValueError, ZeroDivisionError) as error:
            raise InvalidInput(
                f"{file.name} has tensors of shapes that no IP-Adapter for {self._family.name} has "
                f"({error}); the file is damaged: download it again."
            ) from error
        _check_shapes(file, module, checkpoint, sources, self._family.name)
        return Opened(module, checkpoint, sources)

    def _bytes(self, module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters()) * self._dtype.itemsize


def _check_shapes(
    file: IPAdapterFile, module: IPAdapter, checkpoint: Checkpoint, sources: dict[str, str], family: str
) -> None:
    """Every tensor is in the file, in the shape that the model needs, and there is none besides."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in wanted.items():
        if name not in sources:
            raise InvalidInput(
                f"{file.name} has no {name} and so is not for this {family}, where an IP-Adapter adds to "
                f"{module.places} attentions; choose a complete file made for this model."
            )
        stored = checkpoint.shapes[sources[name]]
        if stored != shape:
            raise InvalidInput(
                f"{file.name}: {sources[name]} has shape {stored}, this {family} needs {shape}; choose an "
                "IP-Adapter made for this model."
            )
        check_dtype(checkpoint, sources[name], file.name)
    further = sorted(sources.keys() - wanted.keys())
    if further:
        raise InvalidInput(
            f"{file.name} has {sources[further[0]]}, which is for nothing in this {family}, where an "
            f"IP-Adapter adds to {module.places} attentions; choose one made for this model."
        )


def _rows(embeds: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The encoded pictures for each row, (B, N, ...): zeros where it is of the negative prompt."""
    rows = embeds.unsqueeze(0).repeat(len(negative), *[1] * embeds.ndim)
    rows[negative.to(rows.device)] = 0
    return rows


def _one_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value)
