"""The commands that pages and scripts tell a user to type, and what the programs that they name say of them."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

from zeda_megatron.__main__ import COMMANDS
from zeda_megatron.__main__ import main as zeda
from zeda_megatron.config.arguments import parse
from zeda_megatron.config.options import GROUPS
from zeda_megatron.planning.memory_sheet import read_command

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "launch/pretrain_zeda.sh"
ZEDA = "zeda_megatron/__main__.py"
PROGRAM = re.compile(r"(launch|tools|examples|tests|kernels)/[\w/]+\.(py|sh|sbatch)")
TAKE_A_RECIPE = [("tools/memory.py", ()), (ZEDA, ("plan", "memory")), (ZEDA, ("plan", "fit"))]
"""These take the flags of training beside their own."""
ENDS = (">", "|", "&&", ";", ")", "`")


def lines(text: str) -> list[tuple[list[str], str]]:
    """Commands of bash, each as its words, and its comments: those behind it and the line of comment above it."""
    found, above, open_line = [], "", ""
    for line in text.replace("\\\n", " ").splitlines():
        if not open_line and line.lstrip().startswith("#"):
            above = line.strip()
            continue
        open_line = f"{open_line}\n{line}" if open_line else line
        try:
            words = shlex.split(open_line, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        behind = "#" + open_line.rpartition(" #")[2] if " #" in open_line else ""
        open_line = ""
        if words:
            found.append((words, f"{above} {behind}"))
        above = ""
    assert not open_line, f"a quotation without end: {open_line}"
    return found


def commands(text: str, is_script: bool) -> list[list[str]]:
    """Commands of a script, or of a page's bash blocks, as lists of words without redirections and comments."""
    return [words for words, _ in commented(text, is_script)]


def commented(text: str, is_script: bool) -> list[tuple[list[str], str]]:
    """As `commands`, each with its comments."""
    if is_script:  # line by line: here-documents and functions are not for us
        pairs = []
        for line in text.replace("\\\n", " ").splitlines():
            with contextlib.suppress(ValueError):
                words = shlex.split(line, comments=True)
                pairs += [(words, "")] if words and not words[0].endswith("()") else []
    else:
        pairs = [
            pair for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) for pair in lines(block)
        ]
    found = []
    for words, comment in pairs:
        inner = next((re.search(r"\$\((python .*)\)", word) for word in words if "$(python" in word), None)
        if inner:
            words = shlex.split(inner[1])
        while words:
            end = next((place for place, word in enumerate(words) if word in ENDS), len(words))
            if words[:end]:
                found.append((words[:end], comment))
            words = words[end + 1 :]
    return found


def inline(text: str) -> list[list[str]]:
    """Commands in the sentences of a page: `zeda plan flops --hf DIR`."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    begins = (
        r"(zeda|python|bash|torchrun|sbatch|pytest)\s.*\s?-"  # a program alone is a name: `zeda evaluate`
    )
    found = []
    for span in spans:
        if re.match(begins, span, re.S):
            with contextlib.suppress(ValueError):
                found.append(shlex.split(span))
    return found


def program(words: list[str]) -> tuple[str, list[str]] | None:
    """The file of ours that a command runs, from the repository's top, and its arguments."""
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word == "-m" and rest and "pytest" not in words[:place]:
            if rest[0] == "zeda_megatron":
                return ZEDA, rest[1:]
            if rest[0].split(".")[0] in ("tools", "examples", "tests"):
                return rest[0].replace(".", "/") + ".py", rest[1:]
            return None
        if word == "zeda":
            return (LAUNCH, rest[1:]) if rest[:1] == ["train"] else (ZEDA, rest)
        file = re.sub(r"^\$\{?(ROOT|HERE)\}?/", "", word)
        if file == LAUNCH or PROGRAM.fullmatch(file):
            return (file, rest) if words[0] not in ("cp", "pytest") else None
    return None


def without_variables(words: list[str]) -> list[str]:
    """`$WORK/run` stands for any path. A bare `$STEPS` holds flags, and "$@" is the caller's: left out."""
    kept = [word for word in words if word not in ("$@", "$*", "$STEPS")]
    return [re.sub(r"\$\{?\w+(:?[-=?][^}]*)?\}?", "1", word) for word in kept]


def check(words: list[str], whole: bool = True) -> None:
    """Fails if a command of ours names a file that is not there, a subcommand or a flag that its program does not know.

    Args:
        whole: the values are meant as they stand, so programs that can read them do.
    """
    for word in words:
        if PROGRAM.fullmatch(word):
            assert (ROOT / word).is_file(), f"no such file: {word}"
    found = program(words)
    if not found:
        return
    file, arguments = found[0], without_variables(found[1])
    if not (ROOT / file).is_file():  # `$HERE/tool.py` of a script beside it
        assert not PROGRAM.fullmatch(file), f"no such file: {file}"
        return
    configs = [word for word in arguments if word.endswith((".yaml", ".yml"))]
    assert not [c for c in configs if c.startswith("examples/") and not (ROOT / c).is_file()], (
        "no such recipe"
    )
    if whole and file == LAUNCH and all((ROOT / config).is_file() for config in configs):
        parse(arguments, GROUPS)
    elif whole and file == "tools/memory.py":
        read_command(arguments)
    else:
        flags = {word.split("=")[0] for word in arguments if re.match(r"--[a-z]", word)}
        name = command(file, arguments)
        unknown = flags - known_flags(file, name) if flags else set()
        assert not unknown, f"{file} {' '.join(name)} does not know {sorted(unknown)}"


def command(file: str, arguments: list[str]) -> tuple[str, ...]:
    """What stands before the flags and chooses the parser: `evaluate run`, `hf-to-megatron`."""
    before = arguments[: next((i for i, word in enumerate(arguments) if word.startswith("-")), None)]
    if file == ZEDA:
        words = 2 if " ".join(before[:2]) in COMMANDS else 1
        assert " ".join(before[:words]) in COMMANDS or not before, f"zeda {' '.join(before)}: no such command"
        return tuple(before[: words + (before[:1] == ["convert"])])
    return tuple(before[:1]) if file == "tools/checkpoint_convert.py" else ()


@cache
def known_flags(file: str, command: tuple[str, ...] = ()) -> set[str]:
    """Flags that a program knows: those of its help, or of the text of a script and of the program behind it."""
    text = (ROOT / file).read_text()
    if file == LAUNCH:
        return known_flags(ZEDA, ("train",))
    if (file, command) in TAKE_A_RECIPE:
        return known_flags(ZEDA, ("train",)) | set(re.findall(r"--[a-z][\w-]*", help_text(file, command)))
    if file.endswith((".sh", ".sbatch")):
        beside = [(ROOT / file).parent / name for name in re.findall(r"\$HERE/(\w+\.py)\"? \"\$@\"", text)]
        text += "".join(path.read_text() for path in beside)
        return set(re.findall(r"--[a-z][\w-]*", text))
    if file == ZEDA or "add_argument" not in text:
        text = help_text(file, command)
        return set(re.findall(r"--[a-z][\w-]*", text))
    return {"--help", *re.findall(r"[\"'](--[a-z][\w-]*)[\"']", text)}


def help_text(file: str, command: tuple[str, ...]) -> str:
    said = io.StringIO()
    old = sys.argv
    sys.argv = [file, *command, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            if file == ZEDA:
                zeda([*command, "--help"])
            else:
                runpy.run_path(str(ROOT / file), run_name="__main__")
    finally:
        sys.argv = old
    return said.getvalue()
