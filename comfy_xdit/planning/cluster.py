"""What the ranks would run on: devices, what they compute and move per second, how they are linked.

Bandwidths are bytes per second and device, in one direction; latencies are seconds per collective.
Peak figures are the vendors' dense ones for 16 bits. What a diffusion transformer reaches of them
and the effective speed of links were fitted once, and checked, in docs/planner.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from comfy_xdit.protocol.errors import InvalidInput

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One device.

    Args:
        name: as torch names it, or as the person wrote it.
        kind: "cuda" or "cpu".
        matmul: FLOP/s that large matrix products and attention sustain, in 16 bits (CPU: 32).
        bandwidth: bytes/s of its memory.
        memory: bytes that models and activations may fill; on CPU of all ranks together.
    """

    name: str
    kind: str
    matmul: float
    bandwidth: float
    memory: int


@dataclass(frozen=True)
class Link:
    """A way between devices: bytes/s and the least seconds of a collective.

    Each device has the bandwidth of a link within a socket for itself; all devices of a socket or
    of a machine share that of the boundary to the next one.
    """

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink", 190e9, 30e-6)
PCIE = Link("PCIe", 22e9, 40e-6)
PCIE_HOST = Link("PCIe through the host's memory", 6e9, 60e-6)
SOCKETS = Link("PCIe across sockets", 30e9, 60e-6)
ETHERNET = Link("Ethernet", 10e9, 150e-6)  # 100 Gbit/s
GLOO = Link("shared memory (gloo)", 0.6e9, 1e-3)

# Dense 16-bit TFLOP/s, the share of it that is sustained, GB/s of memory, GiB.
# A device that is not here is taken for UNKNOWN, until times measured on it correct that.
_GPUS = {
    "H200": (989, 0.5, 4800, 141),
    "H100": (989, 0.5, 3350, 80),
    "H800": (989, 0.5, 3350, 80),
    "H20": (148, 0.7, 4000, 96),
    "B200": (2250, 0.45, 8000, 180),
    "A100": (312, 0.65, 2039, 80),
    "A800": (312, 0.65, 2039, 80),
    "L40S": (362, 0.55, 864, 48),
    "L40": (181, 0.7, 864, 48),
    "L20": (119.5, 0.8, 864, 48),
    "L4": (121, 0.5, 300, 24),
    "A10": (125, 0.5, 600, 24),
    "A6000": (155, 0.6, 768, 48),
    "5090": (209, 0.7, 1792, 32),
    "4090": (165, 0.75, 1008, 24),
    "3090": (71, 0.8, 936, 24),
    "V100": (125, 0.5, 900, 32),
    "T4": (65, 0.35, 320, 16),
    "MI300X": (1307, 0.4, 5300, 192),
}
UNKNOWN = (60, 0.5, 500, 16)
_LINKED_BY_NVLINK = ("H200", "H100", "H800", "H20", "B200", "A100", "A800", "V100", "MI300X")
CPU_CORE = 50e9  # fp32 FLOP/s of one thread; what layouts are compared by hardly depends on it
CPU_BANDWIDTH = 20e9
CPU_RANKS = 2  # more only share the same cores


def gpu(name: str, memory: int | None = None) -> Device:
    """The figures of the GPU that torch calls `name`; those of UNKNOWN for one that is not known.

    Args:
        memory: bytes, where the machine says; a tenth stays free for what a step computes.
    """
    words = re.split(r"[^A-Z0-9]+", name.upper())
    found = next((figures for key, figures in _GPUS.items() if key in words), UNKNOWN)
    peak, sustained, bandwidth, gib = found
    total = gib * GIB if memory is None else memory
    return Device(name, "cuda", peak * sustained * 1e12, bandwidth * 1e9, int(0.9 * total))


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `count` equal devices, of which `socket` in a row hang on one processor.

    On CPU a "device" is a rank.
    """

    device: Device
    count: int
    near: Link
    far: Link | None = None
    socket: int | None = None
    nodes: int = 1
    between: Link = ETHERNET

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.count * self.nodes

    def boundary(self, span: int) -> Link | None:
        """What `span` devices in a row must cross: other machines, the other socket, or nothing."""
        if span > self.count:
            return self.between
        if self.far is not None and span > (self.socket or self.count):
            return self.far
        return None

    def describe(self) -> str:
        """E.g. `2 x 8 x NVIDIA L40, PCIe, PCIe across sockets, Ethernet between machines`."""
        links = [self.near.name] if self.size > 1 else []
        if self.far is not None and (self.socket or self.count) < self.count:
            links.append(self.far.name)
        if self.nodes > 1:
            links.append(f"{self.between.name} between machines")
        machines = f"{self.nodes} x " if self.nodes > 1 else ""
        return ", ".join([f"{machines}{self.count} x {self.device.name}", *links])

    def reduced(self, memory: int) -> Cluster:
        """The same with so many bytes per device."""
        return replace(self, device=replace(self.device, memory=memory))


def of_cpu(ranks: int, memory: int) -> Cluster:
    """So many CPU ranks of this machine, which share `memory` bytes."""
    return Cluster(Device("CPU", "cpu", CPU_CORE, CPU_BANDWIDTH, memory), ranks, GLOO)


def parse(text: str) -> Cluster:
    """A cluster in words: "8 x L40 PCIe", "8 x H100 NVLink", "2 x 8 L40 Ethernet", "4 x RTX 4090".

    Without a word for the link, devices that are sold with NVLink have it and others have PCIe; five
    or more on PCIe hang on two processors.

    Raises:
        InvalidInput: it is not of that form, or the device is not known.
    """
    words = [word for word in text.replace(",", " ").split() if word.lower() not in ("x", "over", "rtx")]
    numbers = [int(words.pop(0)) for _ in range(2) if words and words[0].isdigit() and words[0] not in _GPUS]
    links = {word.lower() for word in words[1:]}
    name = words[0].upper() if words else ""
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1 or name not in _GPUS:
        raise InvalidInput(
            f"{text!r} is no cluster this version can describe; write '8 x L40 PCIe' or "
            f"'2 x 8 H100 Ethernet', with one of {', '.join(sorted(_GPUS))}."
        )
    unknown = links - {"pcie", "nvlink", "ethernet"}
    if unknown:
        raise InvalidInput(
            f"{min(unknown)!r} in {text!r} is none of NVLink, PCIe and Ethernet; write one of them, or none."
        )
    nodes, count = numbers if len(numbers) == 2 else (1, numbers[0])
    nvlink = "nvlink" in links or ("pcie" not in links and name in _LINKED_BY_NVLINK)
    return linked(gpu(name), count, NVLINK if nvlink else PCIE, nodes=nodes)


def linked(device: Device, count: int, near: Link, socket: int | None = None, nodes: int = 1) -> Cluster:
    """`count` devices per machine on one kind of link.

    Args:
        socket: devices on one processor; on PCIe, if unsaid, all of up to four, else half of them.
    """
    if near is NVLINK:
        return Cluster(device, count, near, nodes=nodes)
    return Cluster(device, count, near, SOCKETS, socket or (count if count < 5 else count // 2), nodes)
