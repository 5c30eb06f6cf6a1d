"""A loaded diffusion transformer: built from tensor shapes, called as ComfyUI calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from comfy_xdit.protocol.description import ModelDescription
from comfy_xdit.protocol.errors import InvalidInput
from comfy_xdit.protocol.messages import Residuals
from comfy_xdit.protocol.spec import ModelSpec
from worker.checkpoints import Checkpoint, check_complete, not_finite, read_json
from worker.models import ModelFamily, detect, to_whole_patches
from worker.parallel import (
    Degrees,
    Mesh,
    RankGroups,
    ShardedWeights,
    SpreadTokens,
    Stage,
    block_names,
    ring_kernel,
)
from worker.patches import LoraFiles, PatchedWeights, PatchStore
from worker.transformer.batch import LENGTHS, Batch, check_lengths
from worker.transformer.control import ControlResiduals, check_residuals
from worker.transformer.controlnets import NetCall, summed
from worker.transformer.ip_adapters import IPAdapters

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Transformer:
    """One family's diffusers transformer on this rank's device, with its tokens spread if asked."""

    def __init__(self, spec: ModelSpec, groups: RankGroups, degrees: Degrees):
        self._groups, self._path = groups, spec.path
        folder = _model_folder(Path(spec.path))
        checkpoint = Checkpoint.at(folder, transformer=True)
        self.family: ModelFamily = detect(folder, checkpoint.shapes, spec.path)
        self.config = self._config(checkpoint, folder)
        self.latent = self.family.latent(self.config)
        _check_heads(self.family.name, self.family.heads(self.config), degrees)
        self.dtype = _dtype(spec.weight_dtype, checkpoint, groups.device)
        if degrees.ring > 1 and groups.device.type == "cuda" and self.dtype == torch.float32:
            raise InvalidInput(
                f"ring_degree {degrees.ring} needs fp16 or bf16 on a GPU, and {spec.path} would be computed "
                "in fp32; set weight_dtype to bf16, or ring_degree to 1."
            )
        self._checkpoint, self._tokens, self._patched = checkpoint, None, None
        self._mapping = self.family.mapping(checkpoint.shapes, self.config)
        self.module = _build(self.family, self.config, spec.path)
        self._dtypes = _dtypes(self.module, self.dtype)
        for name, parameter in self.module.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        check_complete(self.module, self._mapping, checkpoint, spec.path)
        self.loras = LoraFiles.of(self.family, self.config, checkpoint.shapes)
        self.ip_adapters = IPAdapters(self.family, self.config, self.dtype, groups.device)
        self._parameters = sum(p.numel() for p in self.module.parameters())
        self._blocks = len(block_names(self.module, self.family.plan))
        self.stage: Stage | None = None
        if degrees.stages > 1:
            # A layout that is only asked about has its stages elsewhere: its first one stands for them.
            index, mesh = (groups.stage, groups.mesh) if degrees == groups.degrees else (0, Mesh())
            self.stage = Stage(self.module, self.family.plan, self.family.name, index, degrees.stages, mesh)
            self._mapping = {name: self._mapping[name] for name in self.module.state_dict()}
        self._shards: ShardedWeights | None = None
        if degrees.shards > 1:
            blocks = self.stage.names if self.stage else block_names(self.module, self.family.plan)
            self._shards = ShardedWeights(self.module, blocks, degrees.shards, None)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights once they are read, and of IP-Adapters that were."""
        shards = self._shards
        whole = {n: p for n, p in self.module.named_parameters() if not (shards and n in shards.places)}
        own = sum(p.numel() * p.dtype.itemsize for p in whole.values())
        return own + (shards.nbytes if shards else 0) + self.ip_adapters.nbytes

    def prove(self) -> None:
        """Nothing is left to prove: the plans of diffusers' classes are for the version that is required."""

    def load(self) -> None:
        """Read the weights. Everything that can be wrong with the file was checked before."""
        whole, shards, device = self._mapping, self._shards, self._groups.device
        if shards is not None:
            shards.load(self.module, self._checkpoint, self._mapping, self._groups.shard_group, device)
            whole = {name: source for name, source in whole.items() if name not in shards.places}
        tensors = self._checkpoint.tensors(whole, self._dtypes, device)
        self.module.load_state_dict(tensors, assign=True, strict=shards is None)
        self.module.to(device).eval().requires_grad_(False)
        native = self.family.native_mapping(self.config)
        weights = self.module.state_dict() | (shards.weights() if shards is not None else {})
        self._patched = PatchedWeights(
            weights, native, self._checkpoint, self._mapping, self._dtypes, self.loras
        )
        self.family.prepare(self.module)
        kernel = ring_kernel(self.module, self._groups)
        if self.stage is not None:
            self.stage.use(kernel)
            return
        if self._groups.degrees.sequence > 1:
            self._tokens = SpreadTokens(self.module, self.family.plan, self._groups.mesh, kernel)
        own = self._own_image if self._tokens else lambda tokens: tokens
        self._control = ControlResiduals(self.module, self.family.control, own)
        self.ip_adapters.attach(self.module, self._tokens)

    def _own_image(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._tokens.own(tokens, "image")

    def require(self, what: str) -> None:
        """Nothing is refused: a diffusers class takes ControlNets, IP-Adapters and whole loops."""

    def preprocess(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refused: ComfyUI's own classes alone have such methods."""
        raise InvalidInput(f"{self.family.name} has no {method} in diffusers' class; restart ComfyUI.")

    def patch(self, name: str, store: PatchStore) -> int:
        """Have the weight patches of one set. Returns how many weights were written.

        Raises:
            InvalidInput: a patch does not fit the model, or its file is no longer there.
        """
        return self._patched.apply(name, store)

    def not_finite(self) -> InvalidInput:
        """What to say when the output is not finite: by the whole file, so that all ranks say the same."""
        mapping = self.family.mapping(self._checkpoint.shapes, self.config)
        keys = [source.key for source in mapping.values() if source.key in self._checkpoint.shapes]
        return not_finite(self._checkpoint, keys, self.dtype, self._path)

    def describe(self) -> dict[str, Any]:
        """What the host needs to know, as `ModelDescription.of` reads it."""
        family, config = self.family, self.config
        return ModelDescription(
            family=family.name,
            comfyui=False,
            latent=self.latent,
            sampling=family.sampling(config),
            prompt=family.prompt(config),
            guided=family.guided,
            rows_apart=True,
            heads=family.heads(config),
            width=family.width(config),
            blocks=self._blocks,
            dual=family.dual(config),
            streams=family.plan.streams,
            text_tokens=family.text_tokens,
            products=family.products,
            parameters=self._parameters,
            stored=str(self._checkpoint.common_dtype()).removeprefix("torch."),
            dtype=str(self.dtype).removeprefix("torch."),
            twin=family.twin(config),
            beside=family.beside(config),
            skips=family.plan.skips is not None,
        ).plain()

    def _predict(self, batch: Batch) -> torch.Tensor:
        """The transformer's output, shaped like x and in its dtype. All sequence ranks call it alike."""
        parts, whole = self._net_residuals(batch)
        with (
            self._control.of([batch.control, whole], parts),
            self.ip_adapters.of(batch.pictures, batch.timestep),
        ):
            return self.predict_plain(batch)

    def predict_plain(self, batch: Batch) -> torch.Tensor:
        """The same without ControlNets and IP-Adapters: also what a stage of a pipeline runs a part of."""
        padded = self.whole_patches(batch.x.to(self.dtype))
        call = self.family.call(self.config, padded, batch.timestep, batch.conditions)
        (sample,) = self.module(**call.kwargs, return_dict=False)
        output = self.family.output(self.config, sample, padded)
        sizes = (slice(size) for size in batch.x.shape[2:])
        return output[(..., *sizes)].to(batch.x.dtype)

    def whole_patches(self, x: torch.Tensor) -> torch.Tensor:
        """A latent with all of its tokens."""
        return to_whole_patches(x, self.latent.patch)

    def image_tokens(self, batch: Batch) -> int:
        """How many tokens of the picture a call has."""
        x = self.whole_patches(batch.x)
        return self.family.call(self.config, x, batch.timestep, batch.conditions).image_tokens

    def predict_batch(self, batch: Batch) -> torch.Tensor:
        """The transformer's output, shaped like x.

        The rows of the batch are spread over the branches, as evenly as they go. With fewer rows than
        branches some have none; a batch of one row is computed by all, which costs no time and no exchange.
        """
        shard = self._groups.rows(len(batch))
        if shard is None:
            return self._predict_by_length(batch)
        own = batch.rows(shard.span(self._groups.branch))
        # Sequence ranks of one branch have the same rows, so that one without any skips as a whole.
        outputs = self._predict_by_length(own) if len(own) else batch.x[:0, : self.latent.channels]
        self.gather_unused(self.idle_calls([batch]))
        return self._groups.gather_rows(outputs, shard)

    def idle_calls(self, batches: Sequence[Batch]) -> int:
        """How many calls fewer than another branch this one makes of the rows of some batches.

        Every rank knows all rows, so that nothing is exchanged to know it. 0 where it does not matter.
        """
        if self._shards is None:
            return 0
        calls = [0] * self._groups.degrees.branches
        for batch in batches:
            shard = self._groups.rows(len(batch))
            for branch in range(len(calls)):
                calls[branch] += (batch if shard is None else batch.rows(shard.span(branch))).calls
        return max(calls) - calls[self._groups.branch]

    def gather_unused(self, calls: int) -> None:
        """Give others the weights that they need in so many calls which this rank does not make."""
        for _ in range(calls):
            self._shards.gather_unused()

    def _predict_by_length(self, batch: Batch) -> torch.Tensor:
        """Prompt lengths apart: padding would be attended to."""
        order: list[int] = []
        outputs = []
        for rows, group in batch.by_length():
            order += rows
            outputs.append(self._predict(group))
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs)[torch.tensor(order).argsort()]

    def check(
        self,
        x: torch.Tensor,
        conditions: dict[str, Any],
        control: Residuals | None = None,
        nets: Sequence[NetCall] = (),
    ) -> dict[str, Any]:
        """The conditions that are set. Raises InvalidInput before any rank has begun to compute."""
        taken = replace(self.latent, channels=self.latent.channels + self.family.beside(self.config))
        if not taken.fits(x):
            raise InvalidInput(
                f"the latent has shape {tuple(x.shape)}, {self.family.name} takes {taken.shape}; make "
                f"it with an empty latent node for {self.latent.channels} channels."
            )
        if not torch.isfinite(x).all():
            raise InvalidInput(
                "the latent holds values that are not finite (NaN or infinity); check the node that made it."
            )
        check_lengths(conditions, x.shape[0])
        lengths = {name: value for name, value in conditions.items() if name == LENGTHS and value is not None}
        conditions = {name: value for name, value in conditions.items() if name != LENGTHS}
        conditions = self.family.check_conditions(conditions)
        call = self.family.call(self.config, self.whole_patches(x), x.new_zeros(x.shape[0]), conditions)
        width = self.family.width(self.config)
        check_residuals(control, self.family.control, x.shape[0], call.image_tokens, width)
        for net in nets:
            net.net.check(x, net)
        return conditions | lengths

    def _net_residuals(self, batch: Batch) -> tuple[Residuals, Residuals]:
        """What ControlNets in the ranks add to this rank's image tokens, and what they add to all."""
        if not batch.nets:
            return {}, {}
        x = self.whole_patches(batch.x.to(self.dtype))
        tokens = self.family.call(self.config, x, batch.timestep, batch.conditions).image_tokens
        residuals = summed(
            [net.net.residuals(x, batch.timestep, batch.conditions, net) for net in batch.nets]
        )
        if self._tokens is None or tokens == self.latent.tokens(x.shape):
            return residuals, {}
        # Reference latents follow the picture, and other ranks have other parts of it than of its hint.
        return {}, batch.nets[0].net.whole(residuals)

    def _config(self, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
        try:
            config = self.family.config(checkpoint.shapes)
        except InvalidInput:
            raise
        except (KeyError, ValueError, IndexError, ArithmeticError) as error:
            raise InvalidInput(
                f"{folder} looks like {self.family.name}, but lacks {error}; choose a complete file."
            ) from error
        stored = folder / "config.json" if folder.is_dir() else None
        if stored is not None and stored.exists():
            # Shapes cannot tell everything (heads without a norm, rope axes): the folder's word wins.
            words = read_json(stored)
            config |= {key: words[key] for key in config if key in words and key != "dual_attention_layers"}
        return config


def _build(family: ModelFamily, config: dict[str, Any], path: str) -> torch.nn.Module:
    """The transformer without weights."""
    try:
        with init_empty_weights():
            return family.build(config)
    except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise InvalidInput(
            f"{path} looks like {family.name}, but its tensors have shapes that no such model has ({error}); "
            "the file is damaged: download it again."
        ) from error


def _dtypes(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of each tensor `dtype`, but of those that diffusers keeps in fp32 wherever it loads the class."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return {name: torch.float32 if kept & set(name.split(".")) else dtype for name in module.state_dict()}


def _check_heads(family: str, heads: int, degrees: Degrees) -> None:
    if heads < degrees.ulysses:
        raise InvalidInput(
            f"ulysses_degree {degrees.ulysses} is more than the {heads} attention heads of this {family}, so "
            f"some ranks would have none; set ulysses_degree to {heads} or less, or use ring_degree."
        )


def _model_folder(path: Path) -> Path:
    """The transformer's folder of a pipeline; anything else is itself."""
    return path / "transformer" if (path / "model_index.json").exists() else path


def _dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name != "default":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else checkpoint.common_dtype()
