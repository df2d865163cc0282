"""launch/slurm/submit_chain.sh --dry-run prints commands that the real programs understand."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from zeda_megatron.config.arguments import parse
from zeda_megatron.config.convert import ExportOptions, ImportOptions, VerifyOptions, read_conversion
from zeda_megatron.config.fit import FitOptions
from zeda_megatron.config.options import GROUPS, Options
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.planning import doctor as machine_check

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = ROOT / "launch" / "slurm" / "submit_chain.sh"
STEPS = ["convert", "stage0", "fit", "stage1", "stage2", "export", "evaluate"]

SHARED = {"CONVERT_FLAGS": "(--num-zero-experts 64)"}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Settings that point to files which are there."""
    (tmp_path / "hf").mkdir()
    for name in ("hf/config.json", "prompts.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("{}\n")
    found = {"HF": "hf", "WORK": "work", "PROMPTS": "prompts.jsonl", "HELDOUT": "heldout.jsonl"}
    return {name: str(tmp_path / file) for name, file in found.items()} | {"RECIPE": "examples/qwen3_30b_a3b"}


@pytest.fixture
def submit(files, tmp_path):
    """`submit(flags, NAME="value", ...)`; sbatch is a stand-in that counts. Returns the finished process."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/submitted\nwc -l <{tmp_path}/submitted\n')
    sbatch.chmod(0o755)

    def run(*flags: str, **settings: str) -> subprocess.CompletedProcess:
        template = (ROOT / "launch" / "slurm" / "settings.sh").read_text()
        lines = [f"{name}={value}" for name, value in (files | settings).items()]
        (tmp_path / "mine.sh").write_text("\n".join([template, *lines, ""]))
        return subprocess.run(
            ["bash", str(SUBMIT), "mine.sh", *flags],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return run


def printed(done: subprocess.CompletedProcess) -> dict[str, list[list[str]]]:
    """By step: the words of sbatch, then those of each command of the job."""
    assert done.returncode == 0, done.stderr
    steps: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        if words[0] == "sbatch":
            name = Path(words[-2]).stem
            steps[name] = []
        steps[name].append(words)
    return steps


def after(words: list[str], program: str) -> list[str]:
    return words[words.index(program) + 1 :]


def test_every_printed_command_is_understood(submit, tmp_path, monkeypatch):
    steps = printed(submit("--dry-run", SHARDS="3", PLAN="()"))
    assert list(steps) == STEPS
    assert not (tmp_path / "submitted").exists() and not (tmp_path / "work").exists()
    monkeypatch.chdir(ROOT)
    for step in ("stage0", "stage1", "stage2", "evaluate"):
        options = Options(**parse(after(steps[step][-1], "launch/pretrain_zeda.sh"), GROUPS))
        options.validate()
        if step == "evaluate":
            assert options.model.stage == "eval"
            assert options.model.pretrained_checkpoint == f"{tmp_path}/work/stage2"
        else:
            assert options.model.stage == step[-1] and options.run.stopped_exit_code == 75
    commands = [*steps["convert"][1:], *steps["export"][1:]]
    read = [type(read_conversion(after(words, "convert"))) for words in commands]
    assert read == [ImportOptions, VerifyOptions, ExportOptions]


def test_a_fit_is_understood_and_what_follows_begins_from_it(submit, tmp_path):
    steps = printed(submit("--dry-run", SHARDS="2", PLAN="()"))
    options = parse(after(steps["fit"][-1], "fit"), {"fit": FitOptions, "parallel": ParallelConfig})
    options["fit"].validate(options["parallel"])
    assert [Path(file).name for file in options["fit"].data_path] == [
        "shard-0-of-2.jsonl",
        "shard-1-of-2.jsonl",
    ]
    for settings, stage1, made in (
        ({}, "fitted", "stage2"),
        ({"STAGE1": "0"}, None, "fitted"),
        ({"STAGE2": "0"}, "fitted", "stage1"),
        (SHARED, "start", "stage2"),
    ):
        steps = printed(submit("--dry-run", PLAN="()", **settings))
        begin = stage1 and after(steps["stage1"][-1], "--pretrained-checkpoint")[0]
        exported = after(steps["export"][-1], "--megatron")[0]
        assert (begin, exported) == (stage1 and f"{tmp_path}/work/{stage1}", f"{tmp_path}/work/{made}")


def test_stage_0_from_servers_is_understood(submit, files, monkeypatch):
    steps = printed(
        submit("--dry-run", SERVER="(vllm serve m --port 9000)", SERVER_PORT="9000", STAGE0_NODES="2")
    )
    _, doctor, server, client = steps["stage0"]
    assert after(server, "serve") == ["m", "--port", "9000", "&"] and "--nodes=2" in server
    assert "--expect-gpus" in doctor and "--nodes=1" in client and "--overlap" in client
    monkeypatch.chdir(ROOT)
    options = Options(**parse(after(client, "launch/pretrain_zeda.sh"), GROUPS))
    options.validate()
    assert options.generate.rollout_url == ["http://NODE:9000/v1"] and options.model.hf_config == files["HF"]


def test_plans_and_health_checks_are_understood(submit, tmp_path, capsys):
    steps = printed(submit("--dry-run", "--from", "stage1", "--to", "stage1", GPUS_PER_NODE="0"))
    _, plan, doctor, _ = steps["stage1"]
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--help"]
    known = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    flags = [word for word in after(plan, "steps") if word.startswith("--")]
    assert "--data-parallel-size" in flags and all(flag in known for flag in flags)
    assert machine_check.main(after(doctor, "doctor")) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_each_step_waits_for_the_one_before_and_goes_with_it(submit):
    steps = printed(submit("--dry-run"))
    for before, name in zip(STEPS, STEPS[1:]):
        assert f"--dependency=afterok:JOB_OF_{before.upper()}" in steps[name][0]
        assert "--kill-on-invalid-dep=yes" in steps[name][0]
    assert not [word for word in steps["convert"][0] if "dependency" in word]


def test_places_are_those_of_the_settings(submit):
    steps = printed(
        submit("--dry-run", SHARDS="5", NODES="4", SBATCH_FLAGS='(--partition=gpu "--comment=a b")')
    )
    assert {"--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8", "--array=0-4"} <= set(steps["stage0"][0])
    assert {"--nodes=4", "--signal=B:USR1@600", "--comment=a b"} <= set(steps["stage1"][0])
    assert {"--nodes=4", "--ntasks=32", "--ntasks-per-node=8"} <= set(steps["stage2"][-1])
    assert {"--nodes=4", "--ntasks=4", "--expect-gpus"} <= set(steps["stage1"][2])
    assert not [word for word in steps["convert"][0] if "gpus" in word]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("/images/zeda.sif", ["apptainer", "exec", "--nv", "/images/zeda.sif"]),
        ("nvcr.io#nvidia/pytorch:25.10-py3", ["--container-image=nvcr.io#nvidia/pytorch:25.10-py3"]),
    ],
)
def test_with_a_container_every_command_runs_in_it_and_sees_the_folders(submit, files, image, words):
    for commands in printed(submit("--dry-run", CONTAINER=f"'{image}'")).values():
        for command in commands[1:]:
            assert set(words) <= set(command)
            mounts = next(word for word in command if f"{files['WORK']}:{files['WORK']}" in word)
            assert f"{ROOT}:{ROOT}" in mounts and f"{files['HF']}:{files['HF']}" in mounts


@pytest.mark.parametrize(
    ("flags", "settings", "expected"),
    [
        (["--from", "stage1", "--to", "stage2"], {}, ["stage1", "stage2"]),
        ([], {"STAGE2": "0"}, ["convert", "stage0", "fit", "stage1", "export", "evaluate"]),
        ([], {"STAGE1": "0"}, ["convert", "stage0", "fit", "export", "evaluate"]),
        (["--to", "stage1"], SHARED, ["convert", "stage0", "stage1"]),
        ([], {"ROLLOUTS": "(/a.jsonl)"}, ["convert", "fit", "stage1", "stage2", "export", "evaluate"]),
        (["--to", "stage1"], {"HELDOUT": ""}, ["convert", "stage0", "fit", "stage1"]),
        ([], {"HELDOUT": ""}, STEPS[:-1]),
    ],
)
def test_steps_can_be_left_out(submit, flags, settings, expected):
    assert list(printed(submit("--dry-run", *flags, **settings))) == expected


def test_one_shard_can_be_submitted_again(submit):
    steps = printed(submit("--dry-run", "--from", "stage0", "--shards", "3,7", SHARDS="8"))
    assert "--array=3,7" in steps["stage0"][0]
    assert after(steps["stage0"][-1], "--shard-index")[0] == "3"
    answers = [word for word in steps["stage1"][-1] if "/rollouts/" in word]
    assert len(answers) == 8


def test_without_dry_run_the_same_commands_are_submitted(submit, tmp_path):
    steps = printed(submit("--dry-run"))
    done = submit()
    assert done.stdout.split() == [word for i, name in enumerate(STEPS, 1) for word in (name, str(i))]
    submitted = (tmp_path / "submitted").read_text().splitlines()
    jobs = {f"JOB_OF_{name.upper()}": str(i) for i, name in enumerate(STEPS, 1)}
    for line, name in zip(submitted, STEPS, strict=True):
        expected = " ".join(steps[name][0][1:])
        for word, job in jobs.items():
            expected = expected.replace(word, job)
        assert line == expected


@pytest.mark.parametrize(
    ("flags", "settings", "said"),
    [
        (["--from", "stage7"], {}, "--from/--to stage7: no such step"),
        (["--fast"], {}, "unknown argument --fast"),
        ([], {"PROMPTS": "/none.jsonl"}, "PROMPTS=/none.jsonl: no such file"),
        ([], {"WORK": "here"}, "WORK=here: give an absolute path"),
        ([], {"HF": "/none"}, "HF=/none: has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(submit, tmp_path, flags, settings, said):
    done = submit(*flags, **settings)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "submitted").exists()


def test_the_settings_template_names_every_setting():
    """Each variable that job.sh or submit_chain.sh gives a default stands in the template."""
    template = (ROOT / "launch" / "slurm" / "settings.sh").read_text()
    text = "".join((ROOT / "launch" / "slurm" / name).read_text() for name in ("job.sh", "submit_chain.sh"))
    names = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):[=?]", text)) - {"SLURM_JOB_NODELIST", "WATCH_SECONDS"}
    assert len(names) > 12
    assert [name for name in sorted(names) if not re.search(rf"\b{name}=", template)] == []


PAGE = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)


def test_the_pages_submissions_are_understood(submit):
    lines = [
        line for block in BLOCKS for line in block.splitlines() if "bash launch/slurm/submit_chain.sh" in line
    ]
    assert len(lines) >= 4
    for line in lines:
        flags = [word for word in shlex.split(line, comments=True)[3:] if word != "--dry-run"]
        printed(submit("--dry-run", *flags, SHARDS="8"))


@pytest.mark.parametrize("layout", [block for block in BLOCKS if "GPUS_PER_NODE=" in block])
@pytest.mark.parametrize("recipe", ["qwen3_30b_a3b", "glm_4_7_flash"])
def test_the_pages_layouts_are_understood(submit, monkeypatch, layout, recipe):
    lines = [line.split("#")[0].strip() for line in layout.splitlines()]
    assert {
        word.split("=")[0] for line in lines for word in line.split() if "=" in word and word[0] != "-"
    } <= {
        "NODES",
        "GPUS_PER_NODE",
        "STAGE1_FLAGS",
        "STAGE2_FLAGS",
    }
    settings = dict(re.findall(r"(\w+)=(\(.*?\)|\S+)", "\n".join(lines)))
    steps = printed(submit("--dry-run", RECIPE=f"examples/{recipe}", PLAN="()", **settings))
    monkeypatch.chdir(ROOT)
    for stage in ("stage1", "stage2", "evaluate"):
        Options(**parse(after(steps[stage][-1], "launch/pretrain_zeda.sh"), GROUPS)).validate()


def test_every_block_of_the_page_is_bash_and_names_files_that_are_there():
    for block in BLOCKS:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for file in re.findall(r"(?:launch|tests|tools)/[\w./]+\w", block):
            assert (ROOT / file).is_file(), file
