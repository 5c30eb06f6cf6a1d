"""How the ranks share a transformer's rows, tokens, blocks and weights. Knows plans, and no family.

What other rooms use of it is here.
"""

from worker.parallel.attention.blockwise import WithLogSumExp, scaled_dot_product_attention
from worker.parallel.attention.kept_keys import Patches
from worker.parallel.attention.seam import catching, choosing
from worker.parallel.groups import Announcement, Degrees, RankGroups, ring_kernel
from worker.parallel.lockstep import Lockstep, OutOfStep
from worker.parallel.mesh import Mesh
from worker.parallel.parts import Shard
from worker.parallel.pipefusion.cuts import block_names
from worker.parallel.pipefusion.stage import Stage
from worker.parallel.plan import (
    Attend,
    Blocks,
    Carrier,
    Compressed,
    Count,
    Frames,
    Grid,
    GroupedMask,
    Named,
    Plan,
    PlanMismatch,
    Prefix,
    Region,
    Spans,
    Tokens,
    Voxels,
)
from worker.parallel.sharding import ShardedWeights
from worker.parallel.tokens import SpreadTokens
from worker.parallel.xfuser_compat import import_xfuser

__all__ = [
    "Announcement",
    "Attend",
    "Blocks",
    "Carrier",
    "Compressed",
    "Count",
    "Degrees",
    "Frames",
    "Grid",
    "GroupedMask",
    "Lockstep",
    "Mesh",
    "Named",
    "OutOfStep",
    "Patches",
    "Plan",
    "PlanMismatch",
    "Prefix",
    "RankGroups",
    "Region",
    "Shard",
    "ShardedWeights",
    "Spans",
    "SpreadTokens",
    "Stage",
    "Tokens",
    "Voxels",
    "WithLogSumExp",
    "block_names",
    "catching",
    "choosing",
    "import_xfuser",
    "ring_kernel",
    "scaled_dot_product_attention",
]
