#!/usr/bin/env python
"""Step time and peak memory of the teacher's modes: python tools/measure_teacher_cost.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.teacher_cost import main

if __name__ == "__main__":
    run_main(main)
