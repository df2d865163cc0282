#!/usr/bin/env python
"""GPU memory of a recipe: python tools/memory.py --hf DIR --config FILE.yaml --gpus N --gpu-memory GIB [flags]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.runtime import cpu


def start() -> int:
    """The options of training bring Megatron with them."""
    cpu.install()
    from zeda_megatron.planning.memory_sheet import main

    return main()


if __name__ == "__main__":
    run_main(start)
