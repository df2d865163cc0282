"""The models that the quickstart can walk with: `run.sh --model NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import arms
import arms_glm
from arm import Arm, net, paired

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Model:
    """What differs between the models; prompts, held-out data, recipes of the stages and figures are the same."""

    name: str
    """Value of `--model`."""
    teacher: Path
    """HF folder of the trained static model."""
    out: Path
    """Folder of a run, unless `--out` names another."""
    arms: tuple[Arm, ...]
    """Arms of the short run."""
    full: tuple[Arm, ...]
    """Arms of `--full`."""


WIDE = arms.Shape(experts=8, picks=2, width=512)
"""Few experts, four times as wide as the model."""
WIDE_ARMS = (
    Arm("paired_untrained", "paired"),
    net("net_kl", 1),
    paired("paired_kl", 0.5),
    *arms.woken(WIDE),
    *arms.waking(WIDE),
)
MODELS = {
    model.name: model
    for model in (
        Model("qwen3", HERE / "teacher", Path("runs/quickstart"), arms.DEFAULT, arms.FULL),
        Model("glm", HERE / "glm" / "teacher", Path("runs/quickstart_glm"), arms_glm.DEFAULT, arms_glm.FULL),
        Model(
            "wide",
            Path("runs/wide/teacher"),
            Path("runs/quickstart_wide"),
            WIDE_ARMS,
            (*WIDE_ARMS, *arms.waking_elsewhere(WIDE)),
        ),
    )
}
