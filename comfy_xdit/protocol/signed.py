"""Words with a signature: nobody without the secret of a group can say anything on its bridge."""

from __future__ import annotations

import hmac
import json
from typing import Any

from comfy_xdit.protocol.errors import WorkerDied, shown

MAC_BYTES = 32
# TCPStore breaks the connection for good above 8 MiB; heads are far smaller.
HEAD_LIMIT = 4 << 20


class Unsigned(WorkerDied):
    """A message that nobody who knows the secret has written: it is not of this group."""


class Unreadable(WorkerDied):
    """A message that is signed and makes no sense: of a rank that was taken over, or of another version."""


class Signer:
    """Signs with HMAC-SHA256 over route, place in the sequence, and content."""

    def __init__(self, secret: str):
        self._key = secret.encode()

    def seal(self, route: str, number: int, head: dict[str, Any]) -> bytes:
        """`head` as message `number` on `route`.

        Raises:
            ValueError: it is longer than HEAD_LIMIT.
        """
        body = json.dumps({"route": route, "sequence": number, **head}).encode()
        if len(body) > HEAD_LIMIT:
            raise ValueError(
                f"a message head of {len(body)} bytes is over {HEAD_LIMIT}; send tensors instead"
            )
        return self.stamp(body) + body

    def open(self, sealed: bytes) -> dict[str, Any]:
        """The head in `sealed`.

        Raises:
            Unsigned: the signature is not of this group.
            ValueError, RecursionError: what is signed is no JSON object.
        """
        mac, body = sealed[:MAC_BYTES], sealed[MAC_BYTES:]
        if not hmac.compare_digest(mac, self.stamp(body)):
            raise Unsigned(
                "a message on the bridge has a bad signature: another process of this machine writes to it"
            )
        head = json.loads(body)
        if not isinstance(head, dict):
            raise ValueError(f"a message is {type(head).__name__}, where an object is due")
        return head

    def stamp(self, text: bytes) -> bytes:
        """The signature of `text`."""
        return hmac.digest(self._key, text, "sha256")


class Sequence:
    """Counts what goes over each route: nothing lost, nothing replayed, nothing on another's route."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def next(self, route: str) -> int:
        """The number of the next message."""
        return self._next.get(route, 0)

    def take(self, route: str) -> int:
        """The number of the message that is on its way now."""
        number = self.next(route)
        self._next[route] = number + 1
        return number

    def check(self, head: dict[str, Any], routes: tuple[str, ...]) -> str:
        """The route of a received `head`, which is one of the receiver's `routes`.

        Raises:
            WorkerDied: it is meant for somebody else, or not the next one of its route.
        """
        if (route := head.get("route")) not in routes:
            raise WorkerDied(f"a message of the route {shown(route)} arrived on {' or '.join(routes)}")
        number, expected = head.get("sequence"), self.take(route)
        if type(number) is not int or number != expected:
            raise WorkerDied(f"message {shown(number)} on {route}, expected {expected}")
        return route
