#!/usr/bin/env python
"""Fit the heads of paired zero experts.

python tools/fit_zero_rows.py --pretrained-checkpoint DIR --data-path FILE --save DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zeda_megatron.fit.run import main
from zeda_megatron.runtime.worker import leave_with_parent, run_worker

if __name__ == "__main__":
    run_worker(main)
elif __name__ == "__mp_main__":  # a child that writes a checkpoint
    leave_with_parent()
