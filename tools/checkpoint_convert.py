#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron, or compare the two: `zeda convert`, without installing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.__main__ import door

if __name__ == "__main__":
    door("convert")
