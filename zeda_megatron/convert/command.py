"""`zeda convert`: does what the command line says, and tells what came of it."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from pathlib import Path

from ..config.convert import ExportOptions, ImportOptions, VerifyOptions
from ..data.tokenizers import has_tokenizer
from .file_writer import Summary
from .hf_to_megatron import hf_to_megatron
from .megatron_to_hf import megatron_to_hf
from .verify import verify


def run(options: ImportOptions | ExportOptions | VerifyOptions) -> int:
    """Convert or compare, and say what came of it."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    started = time.monotonic()
    if isinstance(options, VerifyOptions):
        return _tell_differences(options)
    work = hf_to_megatron if isinstance(options, ImportOptions) else megatron_to_hf
    summary: Summary = work(**vars(options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"wrote {options.out}: {summary.tensors} tensors, {summary.nbytes / 1e9:.3f} GB, "
        f"{summary.zero.num_zero_experts} zero experts per layer, {time.monotonic() - started:.1f} s, "
        f"peak memory {peak:.2f} GB"
    )
    if isinstance(options, ImportOptions) and not has_tokenizer(Path(options.hf)):
        print(f"note: {options.hf} has no tokenizer: training will need --tokenizer-model")
    if isinstance(options, ImportOptions):
        print(
            f"next: sample its answers (zeda train --stage 0 --pretrained-checkpoint {options.out}), or fit zero "
            f"experts to answers that you have (zeda fit --pretrained-checkpoint {options.out})"
        )
    elif options.adapters == "beside":
        print(f"next: PeftModel.from_pretrained(load_model('{options.out}'), '{options.out}/adapter')")
    else:
        print(f"next: vllm serve {options.out}, or zeda evaluate run --model {options.out}")
    return 0


def _tell_differences(options: VerifyOptions) -> int:
    differences = verify(**vars(options))
    for line in differences[:10]:
        print(f"different: {line}", file=sys.stderr)
    if differences:
        print(f"{len(differences)} tensors differ", file=sys.stderr)
        return 1
    print(f"all tensors of {options.hf} are in {options.megatron}, bit for bit")
    return 0
