"""How long a step takes under a layout, and what memory a rank needs: a model of few constants.

Compute is a roofline: matrix products at the device's sustained rate, less where a rank has few
tokens, plus the traffic of norms and rotations. Bytes per step and device follow the table of the
PipeFusion and xDiT papers (arXiv 2405.14430, 2411.01738; p x hs is one activation of all tokens,
L blocks, N ranks): Ulysses 4/N O(p x hs) L; Ring 2 O(p x hs) L, overlapped with attention; PipeFusion
2 O(p x hs), overlapped with everything; CFG and data parallel one latent. A step takes the GPU's
time or, where launching the kernels takes longer, that. Constants: docs/planner.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from comfy_xdit.planning.cluster import Cluster
from comfy_xdit.planning.request import Request
from comfy_xdit.protocol.parallel import ParallelConfig, rank_threads

# Blocks' worth of weights that sharding gathers: the two largest, FLUX.1's being 1.7 times the mean.
GATHERED = 3.5
ACTIVATIONS = 24  # copies of a rank's tokens that are alive at the widest place of a block
FP32_SLOWDOWN = 4  # of a GPU that computes in 32 bits instead of 16


@dataclass(frozen=True)
class Constants:
    """Fitted to published times (docs/planner.md). Seconds, unless said otherwise.

    Args:
        half: tokens per rank at which a GPU's products reach half of the sustained rate.
        passes: how often a block reads or writes its activations outside of products.
        launch: launching the kernels of one block from Python.
        launch_split: what xfuser's attention over several ranks adds to that, and `launch_ring` a ring.
        hop: device time of one more step of a ring, per block.
        exchange: device time around each of Ulysses' exchanges (copies into order), per copy of
            the activations at memory bandwidth: a number of passes.
        scatter: the share of a boundary's bandwidth that an all-to-all across it reaches.
        hidden: the share of attention or of compute under which communication can hide.
        rounding: how sharply the larger of device and launch time counts alone (a p-norm).
        threads: a CPU rank with t threads computes t ** threads as fast as one.
    """

    half: float = 250.0
    passes: float = 60.0
    launch: float = 1.6e-3
    launch_split: float = 1.0e-3
    launch_ring: float = 0.6e-3
    hop: float = 90e-6
    exchange: float = 2.0
    scatter: float = 0.2
    hidden: float = 0.8
    rounding: float = 8.0
    threads: float = 0.9


EAGER = Constants()


@dataclass(frozen=True)
class Prediction:
    """One candidate's step. `compute`, `communication` and `latency` add up to `seconds`.

    `communication` is what is not hidden; `latency` is what launching kernels and starting
    collectives adds. `memory` is bytes per rank; `exact` is False where the image may differ.
    """

    layout: ParallelConfig
    seconds: float
    compute: float
    communication: float
    latency: float
    memory: int
    fits: bool
    exact: bool


def predict(
    layout: ParallelConfig, request: Request, cluster: Cluster, constants: Constants = EAGER
) -> Prediction:
    """Seconds per step (mean over the run) and bytes per rank of `layout` on `cluster`."""
    parts = _Step(layout, request, cluster, constants)
    device = parts.products + parts.traffic + parts.exchanges + parts.starts
    launch = parts.launches
    sharpness = constants.rounding
    seconds = (device**sharpness + launch**sharpness) ** (1 / sharpness)
    compute, communication = parts.products + parts.traffic, parts.exchanges
    stages, steps = layout.pipefusion_degree, request.steps
    warmup = min(layout.warmup_steps, steps) if stages > 1 else 0
    # A step before the pipeline runs goes through the stages one by one.
    stretch = 1 + warmup / steps * (stages - 1)
    memory = _memory(layout, request)
    return Prediction(
        layout,
        seconds * stretch,
        compute * stretch,
        communication * stretch,
        (seconds - compute - communication) * stretch,
        memory,
        memory <= cluster.device.memory / (layout.world_size if cluster.device.kind == "cpu" else 1),
        exact=stages == 1 or warmup == steps,
    )


class _Step:
    """The parts of one step in steady state, in seconds of one rank."""

    def __init__(self, layout: ParallelConfig, request: Request, cluster: Cluster, constants: Constants):
        self._layout, self._shape, self._cluster, self._constants = layout, request.shape, cluster, constants
        branches = layout.data_parallel_degree * layout.cfg_parallel_degree
        self._rows = -(-request.rows // branches)
        self._ranks = layout.sequence_parallel_degree
        self._stages = layout.pipefusion_degree
        self._tokens = self._rows * sum(-(-count // self._ranks) for count in request.streams)
        self._activation = self._tokens * self._shape.width * request.dtype_bytes
        self._request = request
        self._rate = self._sustained()
        self.products, self.attention = self._products()
        self.traffic = self._blocks * constants.passes * self._activation / cluster.device.bandwidth
        self.starts = 0.0
        self.exchanges = self._exchanges()
        self.launches = self._launches()

    @property
    def _blocks(self) -> int:
        """Blocks of the largest stage, which the others wait for."""
        return -(-self._shape.blocks // self._stages)

    def _sustained(self) -> float:
        device = self._cluster.device
        if device.kind == "cpu":
            return device.matmul * rank_threads(self._layout.world_size) ** self._constants.threads
        return device.matmul / (FP32_SLOWDOWN if self._request.dtype_bytes == 4 else 1)

    def _products(self) -> tuple[float, float]:
        """Seconds of all products, and of those the part that is attention between tokens."""
        shape, request = self._shape, self._request
        share = self._rows * self._blocks / (self._ranks * shape.blocks)
        linear = 2 * shape.products * shape.blocks * request.tokens
        linear += 8 * shape.dual * request.image_tokens
        pairs = shape.blocks * request.tokens**2 + shape.dual * request.image_tokens**2
        pairs += shape.blocks * request.tokens * request.text_read
        patch = self._tokens / self._stages  # PipeFusion: as many patches as stages
        half = 0.0 if self._cluster.device.kind == "cpu" else self._constants.half
        attention = share * 4 * shape.width * pairs / self._rate
        return share * linear * shape.width**2 / self._rate * (1 + half / patch) + attention, attention

    def _exchanges(self) -> float:
        layout, seconds = self._layout, 0.0
        if layout.ulysses_degree > 1:
            seconds += self._ulysses(layout.ulysses_degree)
        if layout.ring_degree > 1:
            seconds += self._ring(layout.ring_degree)
        if self._ranks > 1:  # all tokens meet at the end
            seconds += self._send(self._activation * (self._ranks - 1), self._ranks, 1, 1)
        if self._stages > 1:
            seconds += self._pipeline()
        if layout.shard_weights:
            seconds += self._gathering()
        if layout.data_parallel_degree * layout.cfg_parallel_degree > 1:
            latents = self._request.rows * self._request.image_tokens * self._shape.output
            seconds += self._send(latents * self._request.dtype_bytes, layout.world_size, self._ranks, 1)
        return seconds

    def _send(self, count: float, span: int, flows: float, starts: int) -> float:
        """Seconds for every device to move `count` bytes within groups of `span` devices in a row.

        Args:
            flows: how many devices send over a boundary between sockets or machines at a time.
            starts: collectives, whose latency is kept apart.
        """
        near, boundary = self._cluster.near, self._cluster.boundary(span)
        self.starts += starts * max(near.latency, boundary.latency if boundary else 0.0)
        across = boundary.bandwidth / flows if boundary else near.bandwidth
        return count / min(near.bandwidth, across)

    def _ulysses(self, degree: int) -> float:
        """Query, key, value and output: four exchanges per block, of which a part stays at home."""
        blocks = self._blocks + self._shape.dual
        count = 4 * blocks * self._activation
        copies = self._constants.exchange * count / self._cluster.device.bandwidth
        # Half of the devices send half of what they have over a boundary, all to all.
        flows = degree / 4 / self._constants.scatter
        return copies + self._send(count * (degree - 1) / degree, degree, flows, round(4 * blocks))

    def _ring(self, degree: int) -> float:
        """Keys and values go round while attention works on those that came before."""
        hops = (degree - 1) * (self._blocks + self._shape.dual)
        flows = self._layout.ulysses_degree  # neighbours in a ring are that far apart
        on_cpu = self._cluster.device.kind == "cpu"
        # gloo starts sending and receiving keys and values one by one, NCCL all of it at once.
        starts = round(hops * (4 if on_cpu else 1))
        sent = self._send(2 * hops * self._activation, self._ranks, flows, starts)
        hidden = self._constants.hidden * self.attention * (degree - 1) / degree
        extra = 0.0 if on_cpu else hops * self._constants.hop
        return max(0.0, sent - hidden) + extra

    def _pipeline(self) -> float:
        """Patches enter and leave a stage while it computes others."""
        span = self._ranks * self._stages
        # In the middle all outputs of the first half cross that blocks of the second one read.
        outputs = 1 + self._shape.blocks / 2 if self._shape.skips else 1
        sent = self._send(2 * outputs * self._activation, span, self._ranks, 2 * self._stages)
        return max(0.0, sent - self._constants.hidden * (self.products + self.traffic))

    def _gathering(self) -> float:
        """A block's weights come from all ranks that share them while the block before it computes."""
        ranks = self._layout.world_size // self._stages
        calls = self._stages  # PipeFusion: once for each patch
        count = calls * self._shape.parameters / self._stages * self._request.dtype_bytes
        on_cpu = self._cluster.device.kind == "cpu"
        starts = calls * self._blocks * (ranks if on_cpu else 1)  # gloo: one broadcast of each rank
        sent = self._send(count * (ranks - 1) / ranks, self._layout.world_size, 1, starts)
        return max(0.0, sent - self._constants.hidden * (self.products + self.traffic))

    def _launches(self) -> float:
        if self._cluster.device.kind == "cpu":
            return 0.0
        constants, block = self._constants, self._constants.launch
        block += constants.launch_split if self._ranks * self._stages > 1 else 0.0
        block += constants.launch_ring if self._layout.ring_degree > 1 else 0.0
        return self._blocks * self._stages * block  # PipeFusion: once for each of as many patches as stages


def _memory(layout: ParallelConfig, request: Request) -> int:
    """Bytes of the transformer in one rank: weights, activations, PipeFusion's old keys and values.

    Text encoders and VAE go where there is room, or make room (worker/store.py).
    """
    shape, stages = request.shape, layout.pipefusion_degree
    rows = -(-request.rows // (layout.data_parallel_degree * layout.cfg_parallel_degree))
    numbers = rows * request.tokens * shape.width
    kept = 2 * numbers * shape.blocks / stages if stages > 1 else 0
    working = ACTIVATIONS * numbers / layout.sequence_parallel_degree
    weights = shape.parameters / stages
    if layout.shard_weights:
        ranks = layout.world_size // stages
        weights = min(weights, weights / ranks + GATHERED * shape.parameters / shape.blocks)
    return int(request.dtype_bytes * (weights + working + kept))
