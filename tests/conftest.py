"""Shared by all tests: the CPU runtime goes in before any Megatron import."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What libraries keep of the tests' files goes when the tests end.
_CACHE = tempfile.TemporaryDirectory(prefix="zeda-tests-")
os.environ.setdefault("HF_DATASETS_CACHE", _CACHE.name)
os.environ.setdefault(
    "ZEDA_TESTS_TURN", f"{_CACHE.name}/turn"
)  # workers have that of the process that started them
if "PYTEST_XDIST_WORKER" in os.environ:  # folders of one name may hold different models
    os.environ["HF_MODULES_CACHE"] = f"{_CACHE.name}/modules"

import own_kernels  # noqa: E402
from side_by_side import pytest_runtest_protocol, pytest_xdist_make_scheduler  # noqa: E402, F401

from zeda_megatron.runtime import cpu  # noqa: E402

cpu.install()
own_kernels.install()


@pytest.fixture(scope="session")
def one_process():
    """Megatron's process groups with this process alone."""
    from zeda_megatron.config.parallel import ParallelConfig
    from zeda_megatron.runtime.process_groups import initialize

    initialize(ParallelConfig())


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny HF model, its Megatron checkpoints and data, on disk."""
    from tiny_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def halfway(one_process, world, tmp_path_factory):
    """A run stopped (and saved) after two steps; tests that write take a copy."""
    import tiny_world

    folder = tmp_path_factory.mktemp("halfway")
    tiny_world.start(world, save=folder, exit_interval=2).run()
    return folder


@pytest.fixture(scope="session")
def interpreted_library(tmp_path_factory):
    """All kernels, compiled and as PTX, for tests that interpret them; skipped where they cannot be compiled."""
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    from ptx import operators

    return operators.library(tmp_path_factory.mktemp("interpreted"))
