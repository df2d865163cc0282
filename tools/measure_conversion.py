#!/usr/bin/env python3
"""Speed and memory of a conversion both ways, beside a plain copy of the same bytes.

    python tools/measure_conversion.py --work DIR [--layers 5] [--max-shard-bytes 1000000000] [--workers 2]

Needs room for three models in DIR, which must not exist yet and is deleted in the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.evaluation.conversion_speed import main

if __name__ == "__main__":
    run_main(main)
