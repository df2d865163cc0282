#!/usr/bin/env python
"""Quantise an exported model with NVIDIA ModelOpt: python tools/quantize.py --hf DIR --out DIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.serving.quantize import main

if __name__ == "__main__":
    run_main(main)
