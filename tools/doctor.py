#!/usr/bin/env python
"""What is installed and which path each operator takes on this machine: python tools/doctor.py [--json]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.errors import run_main
from zeda_megatron.planning.doctor import main

if __name__ == "__main__":
    run_main(main)
