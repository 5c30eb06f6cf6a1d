"""A rank that computes nothing: what is left of a denoise call is the bridge. Run by benchmarks/bridge.py."""

import torch

from comfy_xdit.protocol.messages import Denoise, Ready
from comfy_xdit.protocol.rpc import Invitation, Rank
from worker.__main__ import run
from worker.loop import serve


def _echo(end: Rank, _invitation: Invitation) -> None:
    def denoise(message: Denoise, _run: object) -> torch.Tensor | None:
        return message.x if end.rank == 0 else None

    end.send(0, Ready({}))
    serve(end, {Denoise: denoise}, torch.device("cpu"), lambda flag: flag)


if __name__ == "__main__":
    run(_echo)
