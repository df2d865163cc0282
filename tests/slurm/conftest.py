"""The cluster and what the chains of the tests have in common. Skipped where Slurm is not installed."""

import tempfile
from pathlib import Path

import pytest
from chain import Chain
from cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster():
    """Two nodes on this machine."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (bash tests/slurm/install.sh)")
    with tempfile.TemporaryDirectory(prefix="zeda-slurm-") as folder, Cluster(Path(folder) / "c") as made:
        yield made


@pytest.fixture(scope="session")
def new_chain(cluster, world, tmp_path_factory):
    """`new_chain(name, KEY="value", ...)`: a chain on the tiny world with a folder of its own."""

    def make(name: str, **settings: str) -> Chain:
        return Chain(cluster, world, tmp_path_factory.mktemp(name), settings)

    return make
