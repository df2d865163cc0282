#!/usr/bin/env python
"""Fit paired zero experts: `zeda fit`, without installing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.__main__ import door

if __name__ == "__main__":
    door("fit")
