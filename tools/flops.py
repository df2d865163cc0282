#!/usr/bin/env python
"""FLOPs, bytes, roofline and predicted speed-up: python tools/flops.py --hf DIR [--zero-share Z]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.planning.cost_sheet import main

if __name__ == "__main__":
    run_main(main)
