"""Another program of the machine that writes into a group's store."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from comfy_xdit.protocol.rpc import Host
from comfy_xdit.protocol.signed import Signer


class Rogue:
    """Another process of the machine: it has found the port, and knows the secret if it is given."""

    def __init__(self, host: Host):
        invitation = host.invitation(0)
        self.store = dist.TCPStore("127.0.0.1", invitation.port, None, False)
        self.signer = Signer(invitation.secret)
        self.expected = host._seen.next  # the number that the host expects of a route

    def push(self, queue: str, route: str, number: int, **head: Any) -> None:
        """Put a signed message into a queue."""
        whole = {"job": 1, "body": {"Cancelled": {"step": 0}}, "tensors": []} | head
        self.store.queue_push(queue, self.signer.seal(route, number, whole))
