"""Every change that a command makes to the disk goes wrong once; each time the same command must end what was begun."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from machine import Command, Machine, Outcome

MODES = ("kill", "torn", "full", "broken")


@dataclass
class Tally:
    """What was tried and what was wrong."""

    tried: dict[str, int] = field(default_factory=dict)
    """Points by mode."""
    misses: list[str] = field(default_factory=list)
    """One line each."""


def contents(root: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content; folders and links too."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(found: dict, wanted: dict) -> list[str]:
    return [
        f"{name}: {'missing' if name not in found else 'left' if name not in wanted else 'other content'}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def points(mode: str, kinds: str, all_of_them: bool) -> list[int]:
    """The changes, from 1, where a mode makes a difference. Without `all_of_them` a row of writes to one file, without
    another change in between, is tried at its first and its last."""
    matters = {"kill": "wno", "torn": "w", "full": "wn", "broken": "wnof"}[mode]
    within = [kind == "W" and kinds[n + 1 : n + 2] == "W" for n, kind in enumerate(kinds)]
    return [
        number
        for number, kind in enumerate(kinds, 1)
        if kind.lower() in matters and (all_of_them or not within[number - 1])
    ]


def is_one_line(outcome: Outcome) -> bool:
    """A failure told as users are told: once; ranks that no launcher ended repeat it with their number."""
    lines = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    ranks = [line for line in lines if line.startswith("error: rank ")]
    return outcome.code == 2 and len(lines) - len(ranks) == 1 and "Traceback" not in outcome.output


def is_removal(outcome: Outcome) -> bool:
    """Whether it was a removal that failed: what is left is for the next call."""
    return outcome.met.startswith(("unlink", "remove", "rmdir", "rename"))


def tail(outcome: Outcome) -> str:
    return f"code {outcome.code}: {' | '.join(outcome.output.splitlines()[-3:])[-300:]}"


def ordeal(
    machine: Machine,
    pristine: Path,
    command: Command,
    read: Callable[[Path], dict] = contents,
    modes: tuple[str, ...] = MODES,
    all_of_them: bool = True,
) -> Tally:
    """Try all points of a command that starts with the files of `pristine`.

    Args:
        read: what must be the same in the end.
        all_of_them: see `points`.
    """

    def begin() -> None:
        shutil.rmtree(machine.root, ignore_errors=True)
        shutil.copytree(pristine, machine.root, symlinks=True)

    tally, wanted = Tally(), None
    kinds = {}
    for mode in ("count", "count flushes", "count"):
        begin()
        whole = machine.run(command, mode)
        assert whole.code == 0 and not whole.hung and not whole.left, tail(whole)
        found = read(machine.root)
        assert wanted is None or found == wanted, differences(found, wanted)
        wanted, kinds[mode] = found, whole.kinds
    for mode in modes:
        numbers = points(mode, kinds["count flushes" if mode == "broken" else "count"], all_of_them)
        tally.tried[mode] = len(numbers)
        for at in numbers:
            begin()
            faulty = machine.run(command, mode, at)
            where = f"{mode} {at} ({faulty.met.replace(str(machine.root), '')})"
            if not faulty.met:
                continue
            wrong = []
            if faulty.hung:
                wrong.append("hung")
            if faulty.left:
                wrong.append(f"{faulty.left} processes left")
            if mode in ("full", "broken") and faulty.code and not is_one_line(faulty):
                wrong.append(tail(faulty))
            # Done in spite of the fault: there was a second way. What could not be removed may be left for the next.
            found = read(machine.root) if faulty.code == 0 else None
            if found is None or (found != wanted and is_removal(faulty)):
                again = machine.run(command)
                if again.code or again.hung:
                    wrong.append(f"again: {tail(again)}")
                    found = wanted
                else:
                    found = read(machine.root)
            if found != wanted:
                wrong.append(f"in the end: {'; '.join(differences(found, wanted)[:4])}")
            if wrong:
                tally.misses.append(f"{where}: {' ## '.join(wrong)}")
    return tally
