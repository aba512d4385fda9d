from collections.abc import Iterator

import pytest

from tests.slurm_cluster import Cluster, slurm_cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all scripts: starting it takes seconds."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
