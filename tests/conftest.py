"""Shared by all tests: the CPU runtime goes in before any Megatron import."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from zeda_megatron.runtime import cpu

cpu.install()


@pytest.fixture(scope="session")
def one_process():
    """Megatron's process groups with this process alone."""
    from zeda_megatron.runtime.process_groups import ParallelConfig, initialize

    initialize(ParallelConfig())
