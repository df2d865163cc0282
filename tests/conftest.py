"""Shared by all tests: the CPU runtime goes in before any Megatron import."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from zeda_megatron.runtime import cpu

cpu.install()
