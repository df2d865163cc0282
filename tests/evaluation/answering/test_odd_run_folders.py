"""A run's folder that was edited, cut or mixed up: one line names file and line or key; nothing lost."""

import contextlib
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from time_limit import at_most

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering import run as run_module
from zeda_megatron.evaluation.answering.engine import About, Answer
from zeda_megatron.evaluation.answering.options import RunOptions
from zeda_megatron.evaluation.answering.run import run
from zeda_megatron.evaluation.comparison.report import ReportOptions, report

FILES = (
    "run.json",
    "tasks/benchmark.json",
    "tasks/answers.jsonl",
    "tasks/verdicts.jsonl",
    "tasks/slots.jsonl",
)
NESTED = "[" * 100_000
LONG = "7" * 5000


class Stub:
    group = parallel = 1
    about = About("stub", None, "f", prompts=lambda conversations: "p")
    counted = 0

    def answer(self, requests, sampling):
        return [Answer(str(r.stream % 2), 3, 5, "stop", (r.stream % 100) / 100) for r in requests]

    def slots(self):
        self.counted += 10
        return self.counted // 2, self.counted


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a whole run's folder, how to run again in a copy of it)."""
    place = tmp_path_factory.mktemp("runs")
    (place / "data").mkdir()
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}], "label": str(i % 2)} for i in range(3)]
    (place / "data" / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go(folder: Path) -> None:
        options = {
            "benchmarks": "tasks",
            "model": "stub",
            "samples": 2,
            "arm": "stub",
            "engine": "transformers",
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "open_engine", lambda options: contextlib.nullcontext(Stub()))
            run(RunOptions(output=str(folder), data=str(place / "data"), **options))

    go(place / "whole")
    return place / "whole", go


def values(file: str, key: str, wrong: list) -> dict:
    """A key of a JSON file, or of the second line of a JSON lines file, with each of these values; or missing."""

    def change(value):
        def edit(folder: Path) -> None:
            path = folder / file
            lines = [path.read_text()] if file.endswith(".json") else path.read_text().splitlines(True)
            which = min(1, len(lines) - 1)
            found = json.loads(lines[which])
            *above, last = key.split("/")
            place = found
            for part in above:
                place = place[part]
            if value is ...:
                del place[last]
            else:
                place[last] = "@"
            text = json.dumps(found)
            if value is not ...:
                shown = value.text if isinstance(value, Raw) else json.dumps(value)
                text = text.replace('"@"', shown)
            lines[which] = text + "\n"
            path.write_text("".join(lines))

        return edit

    return {f"{file} {key} {'missing' if v is ... else shown(v)}": (change(v), file) for v in [..., *wrong]}


class Raw:
    def __init__(self, text):
        self.text = text


def shown(value) -> str:
    return (value.text if isinstance(value, Raw) else repr(value))[:30]


NO_TEXT = [5, None, True, ["x"], {"x": "y"}, Raw('"\\ud800"')]
NO_COUNT = ["5", None, True, -1, 1.5, [5], Raw("NaN"), Raw("Infinity"), Raw("1e400"), Raw(LONG), 10**14]
NO_OBJECT = [5, "x", [], True, Raw(NESTED)]
VALUES = {
    **values("run.json", "identity", [*NO_OBJECT, None, {}]),
    **values("run.json", "identity/engine", NO_TEXT),
    **values("run.json", "identity/arm", NO_TEXT),
    **values("run.json", "identity/fingerprint", NO_TEXT),
    **values("run.json", "identity/seed", ["0", None, True, 1.5, Raw("NaN"), Raw(LONG)]),
    **values("run.json", "identity/settings", [*NO_OBJECT, None, Raw('{"a":' * 200 + "1" + "}" * 200)]),
    **values("run.json", "model", NO_TEXT),
    **values(
        "run.json", "head_flops", ["0", None, True, -1, [], Raw("NaN"), Raw("Infinity"), Raw(LONG), 1e300]
    ),
    **values("run.json", "parallel", [*NO_COUNT, 0]),
    **values("run.json", "environment", [*NO_OBJECT, None, {"torch": 2}]),
    **values("run.json", "config", NO_OBJECT),
    **values("run.json", "origin/zero_experts", [1, 0, "true", [], {}]),
    **values("run.json", "origin/adapted_steps", ["5", True, -1, 1.5, [], Raw("NaN"), Raw(LONG)]),
    **values("tasks/benchmark.json", "identity", [*NO_OBJECT, None, {}]),
    **values("tasks/benchmark.json", "identity/benchmark", NO_TEXT),
    **values("tasks/benchmark.json", "identity/questions", NO_TEXT),
    **values("tasks/benchmark.json", "identity/count", [*NO_COUNT, 0, 4]),
    **values("tasks/benchmark.json", "identity/samples", [*NO_COUNT, 0]),
    **values("tasks/benchmark.json", "title", NO_TEXT),
    **values(
        "tasks/benchmark.json", "uids", [5, "123", None, {}, [1, 2, 3], ["1", "2"], ["1", "1", "2"], []]
    ),
    **values("tasks/benchmark.json", "kinds", [*NO_OBJECT, None, {"1": 5}]),
    **values("tasks/answers.jsonl", "uid", [*NO_TEXT, "9", "2"]),
    **values("tasks/answers.jsonl", "sample", [*NO_COUNT, 0, 2]),
    **values("tasks/answers.jsonl", "text", NO_TEXT),
    **values("tasks/answers.jsonl", "tokens", NO_COUNT),
    **values("tasks/answers.jsonl", "prompt_tokens", NO_COUNT),
    **values("tasks/answers.jsonl", "finish", [*NO_TEXT, "later"]),
    **values("tasks/answers.jsonl", "zero_share", ["0", True, -0.1, 1.1, [], Raw("NaN"), Raw("1e400")]),
    **values("tasks/answers.jsonl", "seconds", ["0", None, True, -1, [], Raw("NaN"), Raw("Infinity"), 1e300]),
    **values("tasks/verdicts.jsonl", "uid", [*NO_TEXT, "9", "2"]),
    **values("tasks/verdicts.jsonl", "sample", [*NO_COUNT, 0, 2]),
    **values("tasks/verdicts.jsonl", "right", [5, 1, 0, "true", None, [], {}, 0.5]),
    **values("tasks/verdicts.jsonl", "note", NO_TEXT),
    **values("tasks/slots.jsonl", "zero", [*NO_COUNT, 11]),
    **values("tasks/slots.jsonl", "routed", [*NO_COUNT, 0, 4]),
}
BYTES = {
    "no JSON": b"x\n",
    "a list": b"[1]\n",
    "null": b"null\n",
    "nested": NESTED.encode() + b"\n",
    "nested objects": b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n",
    "a long number": b'{"a": ' + LONG.encode() + b"}\n",
    "a key twice": b'{"identity": {}, "identity": {}}\n',
    "a mark of the byte order": b"\xef\xbb\xbf{}\n",
    "UTF-16": '{"a": 1}\n'.encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}\n',
    "nothing but zeros": b"\0" * 5000 + b"\n",
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03\n",
    "a million lists": b"[" + b"[]," * 5_000_000 + b"1]\n",
    "a key of 10 MB": b'{"' + b"k" * 10_000_000 + b'": 1}\n',
    "line ends within": b'{"a":\r1,\r"b": 2}\r\n',
}
PLACES = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a terminal": lambda path: os.symlink("/dev/tty", path),
    "a link in a circle": lambda path: os.symlink(path, path),
}


def content(file: str, data: bytes):
    def put(folder: Path) -> None:
        lines = b"" if file.endswith(".json") else (folder / file).read_bytes()
        (folder / file).write_bytes(data + lines)

    return put


def place(file: str, make):
    def put(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return put


CASES = {
    **VALUES,
    **{f"{file} {name}": (content(file, data), file) for file in FILES for name, data in BYTES.items()},
    **{f"{file} {name}": (place(file, make), file) for file in FILES for name, make in PLACES.items()},
    **{
        f"{file} empty": (lambda folder, file=file: (folder / file).write_bytes(b""), file)
        for file in FILES[:2]
    },
    **{
        f"{file} cut off": (
            lambda folder, file=file: os.truncate(folder / file, (folder / file).stat().st_size // 2),
            file,
        )
        for file in FILES[:2]
    },
}


def held(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink() and path.is_file() and path.name != "lock"
    }


def outcome(work, folder: Path, file: str) -> str | None:
    """What went wrong; None: it was refused as it should be."""
    before = held(folder)
    try:
        with at_most(60):
            work()
    except UserError as error:
        said = str(error)
        if "\n" in said or len(said) > 1000 or file not in said:
            return f"said {said[:200]}"
        if file.endswith("l") and not re.search(rf"{re.escape(file)}(: (is|cannot)| line \d+:)", said):
            return f"no line: {said[:200]}"
        return None if held(folder) == before else "changed the folder"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"


def misses(runs, names, tmp_path) -> list[str]:
    """Both commands on every case."""
    whole, go = runs
    found = []
    for number, name in enumerate(names):
        spoil, file = CASES[name]
        folder = shutil.copytree(whole, tmp_path / str(number))
        spoil(folder)
        for what, work in (
            ("report", partial(report, ReportOptions(str(folder), str(tmp_path / "out")))),
            ("run", partial(go, folder)),
        ):
            wrong = outcome(work, folder, file)
            found += [f"{what}: {name}: {wrong}"] if wrong else []
    return found


def test_what_a_folder_should_not_hold_is_named(runs, tmp_path, capsys):
    assert len(CASES) > 300
    assert misses(runs, CASES, tmp_path) == []


@pytest.mark.parametrize("file", FILES[2:])
@pytest.mark.parametrize("tail", [b"{", b'{"uid": "1", "sam', b"\0" * 4096, b"x", b'{"uid": "1"}'])
def test_a_last_line_that_a_kill_cut_off_is_no_damage(runs, tmp_path, file, tail):
    folder, go = shutil.copytree(runs[0], tmp_path / "run"), runs[1]
    whole = held(folder)
    with open(folder / file, "ab") as stream:
        stream.write(tail)
    report(ReportOptions(str(folder), str(tmp_path / "out")))
    go(folder)
    now = held(folder)
    assert now.pop("tasks/slots.jsonl").startswith(whole.pop("tasks/slots.jsonl")) and now == whole


def test_a_benchmarks_folder_has_its_name(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    shutil.copytree(folder / "tasks", folder / "gsm8k")
    with pytest.raises(UserError, match=r"gsm8k/benchmark.json: is of 'tasks', in the wrong folder"):
        report(ReportOptions(str(folder), str(tmp_path / "out")))


def test_an_answer_that_is_made_again_is_judged_again(runs, tmp_path):
    folder, go = shutil.copytree(runs[0], tmp_path / "run"), runs[1]
    answers, verdicts = (folder / name for name in FILES[2:4])
    lines = verdicts.read_text().splitlines(True)
    wrong = json.dumps(json.loads(lines[0]) | {"right": False, "note": "old"}) + "\n"
    verdicts.write_text("".join([wrong, *lines[1:]]))
    answers.write_text("".join(answers.read_text().splitlines(True)[1:]))
    go(folder)
    assert sorted(verdicts.read_text().splitlines(True)) == sorted(lines)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "5", "[" * 50_000, '{"a":' * 50 + "1" + "}" * 50, '{"a": 1, "a": 2}', LONG]
)
def test_variables_of_the_template_are_a_plain_object(text):
    with pytest.raises(UserError, match="--chat-args") as error:
        str(RunOptions(chat_args=text).chat_variables)
    assert len(str(error.value)) < 200
