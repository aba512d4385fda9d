"""Faults drawn from a seed, in every phase of a two-rank run: nothing is lost beyond the last checkpoint, no
resume is wrong, nothing hangs, every message is clear.

    MEGAM3_FAULTS=100 MEGAM3_FAULT_SEED=1 python -m pytest -s tests/test_fault_campaign.py

runs a hundred, some ten seconds each, and prints the table by phase and fault that docs/experiments.md keeps.
Without the variable there are four. MEGAM3_FAULT_LIMIT=30 gives ranks more time on a machine that is busy
with other things.
"""

import os
import random
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, Forks, small_disk
from tests.faults.draws import table
from tests.launches import make_workplace


@pytest.mark.slow
@pytest.mark.ranks
def test_faults_in_every_phase_lose_nothing_and_hang_nowhere(tmp_path: Path) -> None:
    num_faults = int(os.environ.get("MEGAM3_FAULTS", "4"))
    rng = random.Random(int(os.environ.get("MEGAM3_FAULT_SEED", "0")))
    place = make_workplace(tmp_path)
    with small_disk(tmp_path / "runs") as can_mount:
        forks = Forks(tmp_path)
        try:
            campaign = Campaign(place, forks, rng, can_mount)
            campaign.run_whole()
            campaign.run_until(num_faults)
        finally:
            forks.close()
    mounted = "" if can_mount else "; nothing could be mounted: no full and no read-only disk"
    print(f"{num_faults} faults over {campaign.num_runs} runs{mounted}\n{table(campaign.outcomes)}")
    assert not campaign.failures, "\n".join(campaign.failures)
    assert len(campaign.outcomes) >= num_faults
