"""A run: interrupted anywhere, it goes on and reports the same; another run's answers are not mixed in."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from examples.rivals.reap import PruneOptions
from zeda_megatron.__main__ import main
from zeda_megatron.config.arguments import parse
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering import run as run_module
from zeda_megatron.evaluation.answering.engine import About, Answer, Origin
from zeda_megatron.evaluation.answering.options import RunOptions
from zeda_megatron.evaluation.answering.run import run
from zeda_megatron.evaluation.comparison.report import ReportOptions, make_report
from zeda_megatron.runtime.lock import NAME as LOCK
from zeda_megatron.runtime.lock import locked


class Stub:
    """Answers with its random stream; may stop in the middle."""

    def __init__(self, group=1, parallel=1, fails_after=None, fingerprint="f", prompts="p"):
        self.group, self.parallel, self.left = group, parallel, fails_after
        self.about = About("stub", None, fingerprint, prompts=lambda conversations: prompts)
        self.asked = []

    def answer(self, requests, sampling):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.asked.append([request.stream for request in requests])
        return [Answer(str(r.stream % 2), 3, 5, "stop", (r.stream % 100) / 100) for r in requests]

    def slots(self):
        return None


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {
            "messages": [{"role": "user", "content": f"Even or odd {i}?"}],
            "label": str(i % 2),
            "kind": f"k{i % 3}",
        }
        for i in range(7)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def go(tmp_path, data, monkeypatch):
    """Run with a stub engine into a named folder; returns the stub."""

    def start(name: str, stub: Stub, **more):
        class Opened:
            def __enter__(self):
                return stub

            def __exit__(self, *_):
                return False

        monkeypatch.setattr(run_module, "open_engine", lambda options: Opened())
        options = {"benchmarks": "tasks", "model": "stub", "samples": 3, "arm": "stub", **more}
        run(RunOptions(output=str(tmp_path / name), data=str(data), **options))
        return stub

    return start


def test_a_run_writes_down_what_its_model_is_and_an_older_run_goes_on_without(go, tmp_path):
    stub = Stub()
    stub.about = replace(stub.about, origin=Origin(True, 900))
    go("run", stub)
    file = tmp_path / "run" / "run.json"
    about = json.loads(file.read_text())
    assert about["origin"] == {"zero_experts": True, "adapted_steps": 900}
    arm = make_report([str(tmp_path / "run")])["arms"]["stub"]
    assert (arm["zero_experts"], arm["adapted_steps"]) == (True, 900)
    file.write_text(json.dumps({key: value for key, value in about.items() if key != "origin"}))
    go("run", stub)
    arm = make_report([str(tmp_path / "run")])["arms"]["stub"]
    assert (arm["zero_experts"], arm["adapted_steps"]) == (None, None)


def test_a_run_says_where_it_is_and_given_again_that_there_is_nothing_to_do(go, tmp_path, capsys):
    report = f"; next: zeda evaluate report --runs {tmp_path / 'run'},OTHER --output DIR"
    for said in ("wrote", "nothing to do: all answers and verdicts are in"):
        go("run", Stub())
        assert capsys.readouterr().err.splitlines() == [f"{said} {tmp_path / 'run'}{report}"]


def figures(folder) -> dict:
    """The report without what depends on the clock and the place."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("tokens_per_second", "folder")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(make_report([str(folder)]))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_run_that_was_interrupted_gives_the_same_report(go, tmp_path, group, stop):
    go("whole", Stub(group))
    with pytest.raises(KeyboardInterrupt):
        go("broken", Stub(group, fails_after=stop))
    second = go("broken", Stub(group))
    assert figures(tmp_path / "broken") == figures(tmp_path / "whole")
    answers = (tmp_path / "broken" / "tasks" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 21
    assert len(second.asked) == -(-21 // group) - stop  # what was there is not asked again


def test_half_a_group_is_made_again_whole_and_keeps_what_is_there(go, tmp_path):
    whole = go("whole", Stub(4))
    go("broken", Stub(4))
    file = tmp_path / "broken" / "tasks" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:9]) + lines[9][:20])
    second = go("broken", Stub(4))
    assert second.asked == whole.asked[2:]
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == [
        json.loads(line)["text"] for line in lines
    ]
    assert figures(tmp_path / "broken") == figures(tmp_path / "whole")


def test_threads_change_nothing(go, tmp_path):
    go("one", Stub())
    go("many", Stub(parallel=4))
    one, many = figures(tmp_path / "one"), figures(tmp_path / "many")
    assert one == many


def test_each_answer_has_its_own_stream_and_each_seed_its_own(go):
    streams = [stream for group in go("a", Stub()).asked for stream in group]
    assert len(set(streams)) == 21
    assert [s for group in go("b", Stub(group=4)).asked for s in group] == streams


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"samples": 2}, "samples was 3, now 2"),
        ({"temperature": 0.0}, "sampling was"),
        ({"max_new_tokens": 5}, "sampling was"),
        ({"limit": 3}, "questions was"),
        ({"arm": "other"}, "arm was stub, now other"),
        ({"stub": Stub(fingerprint="g")}, "fingerprint was f, now g"),
        ({"stub": Stub(group=2)}, "group was 1, now 2"),
        ({"stub": Stub(prompts="q")}, "prompts was p, now q .*chat template"),
    ],
)
def test_answers_of_another_run_are_not_mixed_in(go, change, message):
    go("a", Stub())
    with pytest.raises(UserError, match=f"holds answers of another run: {message}"):
        go("a", change.pop("stub", Stub()), **change)


def test_more_benchmarks_join_a_run(go, tmp_path):
    go("a", Stub())
    go("a", Stub(), benchmarks="reasoning_gym:chain_sum", limit=4, samples=1)
    made = make_report([str(tmp_path / "a")])
    assert [one["name"] for one in made["benchmarks"]] == ["reasoning_gym:chain_sum", "tasks"]


def test_answers_can_be_judged_again(go, tmp_path):
    go("a", Stub())
    file = tmp_path / "a" / "tasks" / "verdicts.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 21
    file.write_text("".join(line.replace('"right": true', '"right": false') + "\n" for line in lines))
    go("a", Stub())
    assert "true" not in file.read_text()
    go("a", Stub(), verify_again=True)
    assert sorted(file.read_text().splitlines()) == sorted(lines)


def test_two_runs_do_not_work_in_one_folder(go, tmp_path):
    go("a", Stub(fails_after=None))
    with (
        locked(tmp_path / "a" / LOCK, "--output"),
        pytest.raises(UserError, match=r"--output .*works here"),
    ):
        go("a", Stub())
    go("a", Stub())
    assert not (tmp_path / "a" / LOCK).exists()


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        (["--mask"], "transformers"),
        (["--moe-pick-rule", "topk=2"], "transformers"),
        (["--calibration", "x"], "transformers"),
        (["--zero-dial", "1"], "openai"),
        (["--dtype", "float16"], "openai"),
        (["--served-model", "m"], "megatron"),
    ],
)
def test_a_setting_of_another_engine_is_refused(flags, engine):
    asked = ["--benchmarks", "tasks", "--model", "x", "--output", "y", "--engine", engine]
    with pytest.raises(UserError, match=f"{flags[0]} .* means nothing to --engine {engine}"):
        main(["evaluate", "run", *asked, *flags])


def test_the_papers_sampling_is_the_default(go, tmp_path):
    go("a", Stub(), samples=None, limit=1)
    about = json.loads((tmp_path / "a" / "tasks" / "benchmark.json").read_text())["identity"]
    wanted = {"max_new_tokens": 38_912, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 0}
    assert about["sampling"] == wanted and about["samples"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--benchmarks is missing"),
        (["--benchmarks", "tasks"], "--model is missing"),
        (["--benchmarks", "tasks", "--model", "x"], "--output is missing"),
        (["--benchmarks", "taks", "--model", "x", "--output", "y"], "did you mean tasks"),
        (["--benchmarks", "tasks", "--model", "x", "--output", "y"], "tasks: no questions"),
        (["--benchmarks", "tasks", "--model", "x", "--output", "y", "--limit", "0"], "--limit 0 must be"),
        (["--benchmarks", "tasks", "--model", "x", "--output", "y", "--engine", "sglang"], "--engine sglang"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        main(["evaluate", "run", *flags])
    assert "\n" not in str(error.value)


def test_an_unknown_command_is_named():
    with pytest.raises(UserError, match="zeda evaluate needs one of run, report"):
        main(["evaluate", "walk"])


def documented() -> list[list[str]]:
    """Commands of the guide and of its page of evidence, without what follows a comment sign."""
    docs = Path(__file__).parents[3] / "docs"
    pages = ((docs / folder / "evaluation.md").read_text() for folder in ("", "evidence"))
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", "\n".join(pages), re.S))
    return [
        shlex.split(line, comments=True)
        for line in blocks.splitlines()
        if "zeda evaluate" in line or ".reap" in line
    ]


@pytest.mark.parametrize("words", documented(), ids=lambda words: " ".join(words[2:])[:50])
def test_every_documented_command_is_understood(words):
    groups = {"run": {"run": RunOptions}, "report": {"report": ReportOptions}}
    if words[:2] == ["python", "-m"]:
        assert parse(words[3:], {"reap": PruneOptions})["reap"].fraction == 0.25
        return
    assert words[:2] == ["zeda", "evaluate"]
    if words[2] in groups:
        assert parse(words[3:], groups[words[2]])[words[2]].output


def command(world, data, output, *more) -> list[str]:
    flags = ["--benchmarks", "tasks", "--model", str(world.hf), "--output", str(output), "--data", str(data)]
    flags += [
        "--samples",
        "3",
        "--concurrency",
        "1",
        "--max-new-tokens",
        "24",
        "--arm",
        "tiny",
        "--seed",
        "3",
    ]
    return [sys.executable, "-m", "zeda_megatron", "evaluate", "run", *flags, *more]


def test_a_real_run_killed_and_resumed_gives_the_same_report(world, data, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert not main(command(world, data, tmp_path / "whole")[3:])
    victim = subprocess.Popen(
        command(world, data, tmp_path / "broken"),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    answers = tmp_path / "broken" / "tasks" / "answers.jsonl"
    while victim.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < 2):
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 2 <= answers.read_bytes().count(b"\n") < 21
    subprocess.run(command(world, data, tmp_path / "broken"), env=env, check=True, capture_output=True)
    assert figures(tmp_path / "broken") == figures(tmp_path / "whole")
