"""What describes a Megatron checkpoint and stands beside it: `zeda.json`, whose one reader and writer this is.

And whose weights a checkpoint holds: an original's, or adapted ones; and what tells them from others. The checkpoint
itself tells both, so they hold for a folder that was renamed, moved or taken out of its run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folders import find_checkpoint, require_checkpoint
from ..checkpoint.integrity import INTEGRITY, fingerprint
from ..checkpoint.state import load_plain_values
from ..config.lora import LoRA
from ..config.zero_experts import SCORE_TERMS, ZERO_EXPERT_ROUTINGS, ZERO_EXPERT_TYPES, ZeroExpertConfig
from ..errors import UserError
from ..strict_json import is_int, read_json

ZEDA_NAME = "zeda.json"
HF_CONFIG_NAME = "hf_config"
_ALWAYS = ("num_zero_experts", "zero_experts_type", "zero_expert_routing")


@dataclass(frozen=True)
class ModelFacts:
    """The content of `zeda.json`. A key that is missing there has the default."""

    num_zero_experts: int = 0
    """Nz."""
    zero_experts_type: str = "zero"
    """zero, copy or learned; paired ones: zero, constant or low_rank."""
    zero_expert_routing: str = "shared"
    """shared or paired."""
    paired_score: str | None = None
    """Terms of a pick's score under paired routing; None: not said."""
    paired_head_width: int = 0
    """Hidden units of the heads; 0: linear ones."""
    stand_in_rank: int = 0
    """Rank of low_rank zero experts."""
    renormalize_after_drop: bool = False
    """Weights over the real picks add up to what all had."""
    adapted_steps: int | None = 0
    """Steps that the weights have been distilled for. 0: they are an original's. None: adapted, for an unknown time."""
    source_sha256: str | None = None
    """Hash of the Hugging Face tensors (or of the checkpoint) that the weights began with."""
    seed: int | None = None
    """Seed of the router's zero rows."""
    dtype: str | None = None
    """`--dtype` of the conversion."""
    source_architecture: str | None = None
    """Architecture of the folder that was converted."""
    lora: LoRA | None = None
    """Adapters beside the weights."""
    base: str | None = None
    """Folder of the checkpoint that has the rest of the weights: this one holds routers and what has trained."""
    base_weights: str | None = None
    """`weights_id` of that checkpoint."""

    def with_zero(self, zero: ZeroExpertConfig) -> ModelFacts:
        """The same facts with these zero experts."""
        return replace(
            self,
            num_zero_experts=zero.num_zero_experts,
            zero_experts_type=zero.zero_experts_type,
            zero_expert_routing=zero.zero_expert_routing,
            paired_score=zero.paired_score if zero.paired else None,
            paired_head_width=zero.paired_head_width,
            stand_in_rank=zero.stand_in_rank,
            renormalize_after_drop=zero.renormalize_after_drop,
        )

    def whole(self) -> ModelFacts:
        """The same facts of a checkpoint that holds all weights, adapters among them."""
        return replace(self, lora=None, base=None, base_weights=None)

    def zero(self) -> ZeroExpertConfig:
        """The zero experts, without what steers them in training."""
        return ZeroExpertConfig(
            num_zero_experts=self.num_zero_experts,
            zero_experts_type=self.zero_experts_type,
            zero_expert_routing=self.zero_expert_routing,
            paired_score=self.paired_score or ZeroExpertConfig.paired_score,
            paired_head_width=self.paired_head_width,
            stand_in_rank=self.stand_in_rank,
            renormalize_after_drop=self.renormalize_after_drop,
        )

    def entries(self) -> dict[str, Any]:
        """Keys of `zeda.json`: the zero experts, and what is not as it is by default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["lora"] = self.lora and asdict(self.lora)
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in values.items() if k in _ALWAYS or v != defaults[k]}

    def text(self) -> str:
        """The text of `zeda.json`."""
        return json.dumps(self.entries(), indent=2) + "\n"


def beside(checkpoint: str | Path, name: str) -> Path | None:
    """A file or folder in a checkpoint folder, or one above a given `iter_*` or `release` folder; None: not there."""
    folder = Path(checkpoint)
    places = [folder]
    if folder.name == "release" or folder.name.startswith("iter_"):
        places.append(folder.absolute().parent)
    return next((place / name for place in places if (place / name).exists()), None)


def read_facts(checkpoint: str | Path) -> ModelFacts | None:
    """`zeda.json` of a checkpoint; None if it has none. Raises `UserError` naming file and key."""
    file = beside(checkpoint, ZEDA_NAME)
    return None if file is None else _checked(read_json(file), file)


def _checked(about: dict[str, Any], file: Path) -> ModelFacts:
    facts = ModelFacts(**{f.name: about[f.name] for f in fields(ModelFacts) if f.name in about})
    lora = facts.lora and _read_lora(facts.lora)
    score = facts.paired_score
    terms = score.split("+") if isinstance(score, str) else [score]
    right = {
        "num_zero_experts": is_int(facts.num_zero_experts) and facts.num_zero_experts >= 0,
        "zero_experts_type": facts.zero_experts_type in ZERO_EXPERT_TYPES,
        "zero_expert_routing": facts.zero_expert_routing in ZERO_EXPERT_ROUTINGS,
        "paired_score": score is None or all(term in SCORE_TERMS for term in terms),
        "paired_head_width": is_int(facts.paired_head_width) and facts.paired_head_width >= 0,
        "stand_in_rank": is_int(facts.stand_in_rank) and facts.stand_in_rank >= 0,
        "renormalize_after_drop": isinstance(facts.renormalize_after_drop, bool),
        "adapted_steps": facts.adapted_steps is None
        or (is_int(facts.adapted_steps) and facts.adapted_steps >= 0),
        **{
            key: getattr(facts, key) is None or isinstance(getattr(facts, key), str)
            for key in ("source_sha256", "base", "base_weights")
        },
        "lora": facts.lora is None or lora is not None,
    }
    for key, is_right in right.items():
        if not is_right:
            raise UserError(f"{file}: {key} {str(about[key])[:60]!r} makes no sense; restore the file")
    return replace(facts, lora=lora)


def _read_lora(entry: Any) -> LoRA | None:
    """None for what makes no sense."""
    try:
        lora = LoRA(**entry)
        lora.validate()
        return lora
    except (TypeError, AttributeError, UserError):
        return None


def weight_folders(checkpoint: str | Path, flag: str) -> list[Path]:
    """Where a checkpoint's weights lie: in its folder, or, where that holds only what has trained, in its base's too,
    which then come first.

    Raises `UserError` naming the flag if there is no readable checkpoint, or the base is gone or another one.
    """
    folder, facts = require_checkpoint(checkpoint, flag), read_facts(checkpoint)
    if facts is None or facts.base is None:
        return [folder]
    told = f"{flag} {checkpoint}: holds what has trained; the rest is in {facts.base}, as its {ZEDA_NAME} says (base)"
    if find_checkpoint(facts.base) is None:
        raise UserError(f"{told}, where no checkpoint is; put it back, or write there where it is now")
    if weights_id(facts.base, flag) != facts.base_weights:
        raise UserError(f"{told}, but that checkpoint has other weights now; restore it")
    return [*weight_folders(facts.base, flag), folder]


def adapted_steps(checkpoint: str | Path, flag: str) -> int | None:
    """Steps that its weights have been distilled for; 0: they are an original's. None: adapted, for an unknown time.

    Raises `UserError` naming the flag if there is no readable checkpoint.
    """
    facts = read_facts(checkpoint)
    if facts is not None and facts.adapted_steps != 0:
        return facts.adapted_steps
    plain = load_plain_values(require_checkpoint(checkpoint, flag), flag)
    progress = plain.get("progress", {})
    distilled = progress.get("iteration", 0) if progress.get("teacher") else 0  # as older checkpoints tell it
    return plain.get("adapted_steps", progress.get("adapted_steps", distilled))


def weights_id(checkpoint: str | Path, flag: str) -> str:
    """A name for the weights: equal wherever the folder lies and whatever it is called.

    Of a converted or fitted checkpoint the hash of the tensors it came from (zero rows and heads do not count), of a
    trained one a hash of its files. Raises `UserError` naming the flag if there is no readable checkpoint.
    """
    folder, facts = require_checkpoint(checkpoint, flag), read_facts(checkpoint)
    trained = "progress" in load_plain_values(folder, flag)
    if facts is not None and facts.source_sha256 and not trained:
        return facts.source_sha256
    if (folder / INTEGRITY).is_file():
        return hashlib.sha256((folder / INTEGRITY).read_bytes()).hexdigest()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    told = "".join(f"{path.name} {fingerprint(path)['sha256']}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()
