"""One of two ranks whose exchanges go through main memory.

Usage: python -m tests.staged_rank RANK FILE, a file that both meet at. Rank 0 prints as JSON what arrived.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from worker.parallel.mesh import Mesh, arrive
from worker.parallel.pipeline import Pipeline
from worker.parallel.staged import NAME, STAGED, backend_of

CPU = torch.device("cpu")


def exchanged(rank: int) -> dict[str, object]:
    """What rank 0 gets by each kind of exchange that the ranks make."""
    pair = dist.new_group([0, 1])
    mesh = Mesh(2, 1, rank, pair, None, pair)
    ring = Mesh(1, 2, rank, None, pair, pair)
    own = torch.arange(3.0) + 10 * rank
    found = {"backend": dist.get_backend(pair)}
    found["exchange"] = mesh.exchange(own, [1, 2], [1, 1] if rank == 0 else [2, 2]).tolist()
    arriving = torch.empty(3)
    works = ring.pass_on(own, arriving)
    before = arriving.clone().zero_()
    arrive(works)
    found["pass_on"], found["before"] = arriving.tolist(), before.tolist()
    above, below = ring.neighbours(own, own + 1)
    found["neighbours"] = [one if one is None else one.tolist() for one in (above, below)]
    found["sum"] = mesh.sum(own).tolist()
    parts = mesh.gather(torch.full((2 - rank, 2), float(rank)), [2, 1], 0)
    found["gather"] = [part.tolist() for part in parts]
    every = [torch.empty(2, 2).T for _ in range(2)]
    dist.all_gather(every, torch.arange(4.0).view(2, 2).T.contiguous() + rank, group=pair)
    found["all_gather"] = [one.tolist() for one in every]
    row = torch.zeros(4, dtype=torch.uint8)
    part = torch.full((2,), rank + 1, dtype=torch.uint8)
    dist.all_gather_into_tensor(row, part, group=pair, async_op=True).wait()
    found["row"] = row.tolist()
    found["pipeline"] = _through_stages(rank)
    return found


def _through_stages(rank: int) -> object:
    """A tensor there and back; what was sent is written to before it has arrived."""
    pipeline = Pipeline([[0, 1]], rank, CPU, timedelta(seconds=60))
    if rank == 0:
        sent = torch.arange(4.0)
        pipeline.tell({"tokens": 4})
        pipeline.send(sent)
        sent.zero_()
        back = pipeline.receive_back((4,), torch.bfloat16).float().tolist()
        pipeline.settle()
        return back
    assert pipeline.told() == {"tokens": 4}
    pipeline.send_back(2 * pipeline.receive((4,), torch.float32).bfloat16())
    pipeline.settle()
    return None


def main(rank: int, file: str) -> None:
    """Meet, exchange, say."""
    os.environ[STAGED] = "1"
    assert backend_of(CPU) == NAME
    dist.init_process_group(backend_of(CPU), init_method=f"file://{file}", rank=rank, world_size=2)
    found = exchanged(rank)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
