"""Whose weights a checkpoint holds: an original's, or adapted ones; and what tells them from others.

Both are told by the checkpoint itself, so they hold for a folder that was renamed, moved or taken out of its run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..checkpoint.folders import require_checkpoint
from ..checkpoint.integrity import INTEGRITY, fingerprint
from ..checkpoint.state import load_plain_values
from .on_disk import read_facts


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
