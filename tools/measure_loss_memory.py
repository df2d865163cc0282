#!/usr/bin/env python
"""Peak memory of the distillation loss, fused and full: python tools/measure_loss_memory.py [--tokens T ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.loss_memory import main

if __name__ == "__main__":
    run_main(main)
