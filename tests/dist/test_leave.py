"""One rank's error ends the job: two real processes, one of which fails while the other sits in a collective
call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.dist import comm
from megam3.dist.env import free_port
from tests.launches import ROOT, make_workplace

# with NCCL, destroying a group waits for peers that are in a collective call: here it waits for an hour, so
# whoever tries it is seen
RANK = """
import sys, time, torch.distributed
from megam3 import train
from megam3.dist import comm
torch.distributed.destroy_process_group = lambda: time.sleep(3600)

def build(config, device, guard):
    if comm.rank() == 1:
        raise {error}
    while True:
        comm.barrier()

train.build = build
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("leave")).recipe


def run_pair(recipe, error):
    """Exit codes and stderr of both ranks; a job that hangs fails the test after two minutes."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(error=error), recipe],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=600)[1] for rank in reversed(ranks)][::-1]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said


@pytest.mark.ranks
def test_an_unexpected_error_shows_its_traceback_and_ends_every_rank(recipe):
    codes, said = run_pair(recipe, "RuntimeError('boom')")
    assert codes == [1, 1]
    assert "megam3: rank 1 failed:\nTraceback" in said[1]
    assert "RuntimeError: boom" in said[1]
    assert "rank 0: another rank has ended" in said[0]


@pytest.mark.ranks
def test_an_error_of_the_user_on_one_rank_ends_every_rank(recipe):
    codes, said = run_pair(recipe, "train.UserError('field', 'value', 'a rule', 'a remedy')")
    assert codes == [1, 2]
    assert "rank 1: " in said[1]
    assert "a remedy" in said[1]


def test_a_rank_alone_is_not_ended():
    comm.leave(3)
    assert Path(__file__).exists()
