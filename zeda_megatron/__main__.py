"""`zeda COMMAND ...`, also `python -m zeda_megatron COMMAND ...`: every program of this package.

Options are read before torch is, and Megatron's CPU runtime is installed before any module that imports Megatron.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from zeda_megatron.config.convert import ExportOptions, ImportOptions, VerifyOptions, read_conversion
from zeda_megatron.config.options import Options, read_options
from zeda_megatron.errors import UserError, cut_short
from zeda_megatron.runtime.worker import (
    is_child_of_program,
    leave_with_parent,
    let_children_import_main,
    run_worker,
)

COMMANDS = {
    "convert": ("", "Hugging Face checkpoints to Megatron's and back, and a comparison of both"),
    "fit": ("fit.run", "fit the heads of paired zero experts"),
    "train": ("", "adapt a model: stages 0 to 2, pretraining, evaluation on held-out text"),
    "evaluate run": ("evaluation.answering.run", "ask a model the questions of benchmarks"),
    "evaluate report": ("evaluation.comparison.report", "compare such runs"),
    "evaluate sandbox": ("evaluation.sandbox.walls", "which walls stand on this machine"),
    "evaluate distance": ("evaluation.quality.measure", "distance of a checkpoint to its teacher"),
    "evaluate drafts": (
        "evaluation.quality.drafts",
        "which drafts of a multi-token-prediction head are accepted",
    ),
    "evaluate oracle": (
        "evaluation.quality.oracle",
        "how good a decision could be, beside heads that were fitted",
    ),
    "evaluate folders": ("evaluation.quality.hf_quality", "distance of exported folders to their teacher"),
    "evaluate export": ("evaluation.quality.export_check", "does an export answer as the checkpoint does?"),
    "plan steps": ("planning.step_plan", "rows per step, steps per epoch"),
    "plan memory": ("planning.memory_sheet", "GPU memory of a recipe, and what would make it fit"),
    "plan fit": ("planning.first_fit", "the first recipe that fits your GPUs, and what it gives up"),
    "plan flops": ("planning.cost_sheet", "FLOPs, bytes and predicted speed-up by zero share"),
    "plan rollouts": ("planning.rollout_sheet", "tokens a second and memory that sampling answers takes"),
    "doctor": ("planning.doctor", "what is installed, and which path every operator takes here"),
    "quantize": ("serving.quantize", "quantise an exported model with NVIDIA ModelOpt"),
    "recipes": ("", "copy recipes, launcher and job templates: zeda recipes --out DIR"),
}
"""Command -> module with `main(argv)`, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` begins with. Returns its exit code.

    Raises:
        UserError: no such command, or what the command cannot do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        several = [known for known in COMMANDS if known.startswith(f"{argv[0]} ")]
        raise UserError(
            f"zeda {argv[0]} needs one of {', '.join(known.split()[1] for known in several)} behind it"
            if several
            else f"zeda {cut_short(name)} is not a command; choose one of {', '.join(COMMANDS)}"
        )
    if name == "train":
        return start_training(rest)
    if name == "recipes":
        return copy_recipes(rest)
    if name == "convert":
        return convert(read_conversion(rest))
    install()
    return import_module(f"zeda_megatron.{COMMANDS[name][0]}").main(rest)


def usage() -> str:
    """What commands there are, a line each."""
    lines = (f"  zeda {name:17} {does}" for name, (_, does) in COMMANDS.items())
    return "\n".join(["usage: zeda COMMAND [flags]; every command has --help", "", *lines])


def install() -> None:
    """Megatron's CPU runtime where there is no GPU; before anything that imports Megatron."""
    from zeda_megatron.runtime import cpu

    cpu.install()


def convert(options: ImportOptions | ExportOptions | VerifyOptions) -> int:
    """Convert or compare; an interruption costs nothing."""
    install()
    from zeda_megatron.convert.command import run

    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def start_training(argv: list[str]) -> int:
    """Check the options, then train: as one of torchrun's processes, else by the launcher, which starts one for each
    GPU of this machine, and knows what srun has started."""
    options = training_options(argv)
    if "RANK" in os.environ:
        return train(options)
    os.environ["PYTHON"] = sys.executable
    script = str(home() / "launch" / "pretrain_zeda.sh")
    os.execvp("bash", ["bash", script, *argv])


def training_options(argv: list[str]) -> Options:
    """The options of a run, checked against one another; nothing has looked at the machine yet."""
    options = read_options(argv, "zeda train")
    options.validate()
    return options


def train(options: Options) -> int:
    """Be one training process."""
    install()
    from zeda_megatron.training.main import train as run

    return run(options)


def home() -> Path:
    """The folder with `launch/` and `examples/`: the checkout, or where the wheel has put them."""
    above = Path(__file__).resolve().parents[1]  # the checkout, or site-packages, or pip's --target
    share = Path("share", "zeda_megatron")
    for place in (above, above / share, Path(sysconfig.get_path("data")) / share):
        if (place / "launch" / "pretrain_zeda.sh").is_file():
            return place
    raise UserError("launch/pretrain_zeda.sh is missing beside zeda_megatron: install the package again")


def copy_recipes(argv: list[str]) -> int:
    """`zeda recipes --out DIR`: recipes, launcher and job templates, to be changed."""
    if len(argv) != 2 or argv[0] != "--out":
        raise UserError("zeda recipes: give --out DIR, a folder for launch/ and examples/")
    for part in ("launch", "examples/qwen3_30b_a3b", "examples/glm_4_7_flash"):
        target = Path(argv[1]) / part
        if target.exists():
            raise UserError(f"--out {argv[1]}: has {part} already; choose another folder")
        try:
            shutil.copytree(home() / part, target)
        except OSError as error:
            raise UserError(f"--out {argv[1]}: cannot be written ({error.strerror or error})") from None
        print(target)
    print(f"next: {Path(argv[1]) / 'examples/qwen3_30b_a3b/README.md'} says what to type")
    return 0


def door(*command: str) -> None:
    """Be the program `zeda COMMAND`; without a command, `zeda`. Exits."""
    let_children_import_main()
    run_worker(lambda: main([*command, *sys.argv[1:]]))


if __name__ == "__main__":
    door()
elif is_child_of_program():  # a child that writes a checkpoint
    leave_with_parent()
