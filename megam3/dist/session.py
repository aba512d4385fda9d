"""Ranks for a tool that only divides its work: a process group that waits as long as the work takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megam3.dist import comm
from megam3.dist.env import RankInfo, discover_ranks

EXIT_LOST_PEER = 1
"""Exit code of a rank that had to end because another one did."""
_WAIT_SECONDS = 7 * 24 * 3600.0
"""Ranks wait at a barrier for the slowest one's whole share; a rank that dies ends the wait at once."""


@contextmanager
def worker_ranks() -> Iterator[RankInfo]:
    """Join the ranks that the launcher started over gloo (one, without a launcher), and leave at the end.

    Raises:
        ConfigError: the launcher's variables are incomplete.
    """
    ranks = discover_ranks(os.environ)
    comm.start(ranks, "gloo", _WAIT_SECONDS)
    try:
        yield ranks
    except RuntimeError as error:
        if not comm.is_lost_peer(error):
            raise
        print(f"megam3: rank {ranks.rank}: another rank has ended; its own message says why", file=sys.stderr)
        raise SystemExit(EXIT_LOST_PEER) from None
    finally:
        comm.stop()


def device_of_rank(name: str | None, ranks: RankInfo) -> str | None:
    """The device a rank works on: as named, or, with several ranks and GPUs, one by its number."""
    count = torch.cuda.device_count()
    if name in (None, "cuda") and ranks.world_size > 1 and count:
        return f"cuda:{ranks.local_rank % count}"
    return name
