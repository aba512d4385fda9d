"""A folder that all ranks share, and one that looks the same and is not, on two real ranks."""

import os
from pathlib import Path

import pytest

from megam3.dist import comm
from megam3.dist.shared_folder import check_shared
from megam3.errors import ConfigError
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
