#!/usr/bin/env python
"""Speed of serving at a forced zero share: python tools/measure_serving.py --hf examples/qwen3_30b_a3b."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.serving_speed import main

if __name__ == "__main__":
    run_main(main)
