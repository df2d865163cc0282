"""A hash that tells two model folders apart without reading all of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ...checkpoint.folders import TRACKER, tracked

_CHUNK, _CHUNKS = 1 << 16, 16
_WEIGHTS = (".safetensors", ".distcp", ".pt", ".bin")
_DESCRIBE = ("config.json", "zeda.json", "hf_config/config.json")


def fingerprint(folder: str | Path) -> str:
    """Hash over the config, names and sizes of the weight files, and parts of each (start, end, 16 places between).

    Weights that were trained further differ nearly everywhere, so samples of 64 KiB tell. Tokenizer and chat template
    are not in it: the hash over the prompts (`prompts.ChatPrompts.digest`) has them.
    """
    root, whole = Path(folder), hashlib.sha256()
    for name in _DESCRIBE:
        if (root / name).is_file():
            whole.update((root / name).read_bytes())
    if (root / TRACKER).is_file():
        whole.update((root / TRACKER).read_bytes())
        latest = tracked(root)
        root = latest if latest is not None and latest.is_dir() else root
    for file in sorted(path for path in root.rglob("*") if path.suffix in _WEIGHTS and path.is_file()):
        size = file.stat().st_size
        whole.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with file.open("rb") as stream:
            for place in range(_CHUNKS + 1):
                stream.seek(max(size - _CHUNK, 0) * place // _CHUNKS)
                whole.update(stream.read(_CHUNK))
    return whole.hexdigest()[:32]
