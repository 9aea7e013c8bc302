"""Several ranks: the processes that `torchrun` starts for one run, and which part of a batch each answers for."""

from retort.ranks.share import WHOLE_BATCH, Share
from retort.ranks.world import CLUSTER, ONE, World, here, join, local_rank, local_size, may_speak, refuse_several

__all__ = [
    "CLUSTER",
    "ONE",
    "WHOLE_BATCH",
    "Share",
    "World",
    "here",
    "join",
    "local_rank",
    "local_size",
    "may_speak",
    "refuse_several",
]
