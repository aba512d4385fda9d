"""A folder that all ranks share, and one that looks the same and is not, on two real ranks."""

import functools
import os
from pathlib import Path

import pytest

from megam3.dist import comm
from megam3.dist.shared_folder import check_shared
from megam3.errors import ConfigError
from tests.launches import make_workplace, train_calls
from tests.ranks import run_ranks


def _check(folder: str) -> dict[str, str]:
    """What each kind of folder gives on this rank."""
    said = {}
    for name, path in (
        ("shared", f"{folder}/runs/a"),
        ("own", f"{folder}/disk-of-{comm.rank()}/runs"),
        ("unwritable", f"{folder}/a-file/runs"),
    ):
        try:
            check_shared(path, "data.store_dir", patience_seconds=0.2)
            said[name] = ""
        except ConfigError as error:
            said[name] = str(error)
    return said


@pytest.mark.ranks
def test_a_folder_that_ranks_do_not_share_is_named_on_every_rank(tmp_path):
    (tmp_path / "a-file").touch()
    said = run_ranks(_check, 2, str(tmp_path))
    for rank in said:
        assert rank["shared"] == ""
        assert "data.store_dir" in rank["own"]
        assert f"1 of 2 ranks (on {os.uname().nodename}) do not see what rank 0" in rank["own"]
        assert "a file system that all nodes share" in rank["own"]
        assert "rank 0 cannot write there" in rank["unwritable"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "a-file"], (
        "nothing is left behind"
    )


def test_one_rank_shares_with_itself(tmp_path):
    check_shared(tmp_path / "runs")
    assert not Path(tmp_path / "runs").exists()


def _train_apart(recipe: str, root: str) -> dict:
    """`megam3 train` with the run folder shared and the store on each node's own disk, under one name."""
    from megam3 import train  # a fresh process picks its accelerator while this is imported

    own = Path(root) / f"disk-of-{comm.rank()}"
    own.mkdir()
    os.chdir(own)
    impatient = functools.partial(check_shared, patience_seconds=0.2)
    train.check_shared = impatient
    arguments = [recipe, f"output_dir={root}/runs", "name=apart", "data.store_dir=store"]
    return train_calls([{"name": "apart", "arguments": arguments}])["apart"]


@pytest.mark.ranks
def test_a_second_node_without_the_store_stops_the_run_before_anything_is_prepared(tmp_path):
    recipe = make_workplace(tmp_path).recipe
    for rank, outcome in enumerate(run_ranks(_train_apart, 2, str(recipe), str(tmp_path))):
        assert outcome["code"] == 2
        message = (
            f"data.store_dir = '{tmp_path}/disk-of-{rank}/store': 1 of 2 ranks (on {os.uname().nodename})"
        )
        assert message in outcome["said"]
        assert "do not see what rank 0" in outcome["said"]
        assert "give a folder on a file system that all nodes share" in outcome["said"]
        assert not [p for p in (tmp_path / f"disk-of-{rank}").rglob("*") if p.is_file()]
    assert not (tmp_path / "runs" / "apart" / "checkpoints").exists()
