#!/usr/bin/env python
"""Bytes between expert-parallel ranks by zero share: python tools/measure_dispatch_bytes.py [--json FILE ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.dispatch_bytes import main

if __name__ == "__main__":
    run_main(main)
