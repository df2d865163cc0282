#!/usr/bin/env python
"""Rows per step, steps per epoch: python tools/plan.py --data-path ROLLOUTS.jsonl --tokenizer-model HF_FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.planning.step_plan import main

if __name__ == "__main__":
    run_main(main)
