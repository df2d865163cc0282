"""Flags and YAML keys: one field each, the command line wins, every mistake is one clear line."""

import dataclasses
import os
import subprocess
import sys
import typing

import pytest

from zeda_megatron.config.arguments import field_docs, parse
from zeda_megatron.config.options import GROUPS, Options, read_options
from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.training.main import check_machine

FIELDS = [(cls, field) for cls in (*GROUPS.values(), ZeroExpertConfig) for field in dataclasses.fields(cls)]


def read(*argv, yaml=None, tmp_path=None):
    argv = list(argv)
    if yaml is not None:
        file = tmp_path / "run.yaml"
        file.write_text(yaml)
        argv = ["--config", str(file), *argv]
    return read_options(argv, "test")


def test_defaults_are_those_of_the_dataclasses():
    assert read() == Options(**{title: cls() for title, cls in GROUPS.items()})


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    yaml = "lr: 1e-3\nseq-length: 64\nbf16: true\nnum_zero_experts: 4\nstage: 0\ndata_path: a.jsonl\n"
    options = read("--seq-length", "32", "--no-bf16", yaml=yaml, tmp_path=tmp_path)
    assert (options.optimizer.lr, options.data.seq_length, options.model.bf16) == (1e-3, 32, False)
    assert (options.model.num_zero_experts, options.model.stage) == (4, "0")
    assert options.data.data_path == ["a.jsonl"]
    assert options.optimizer.train_iters == GROUPS["optimizer"]().train_iters


def test_every_flag_can_be_given_in_both_ways(tmp_path):
    samples = {bool: ("", "true", True), int: ("7", "7", 7), float: ("0.5", "0.5", 0.5), str: ("x", "x", "x")}
    for cls in GROUPS.values():
        for field in dataclasses.fields(cls):
            hint = str(typing.get_type_hints(cls)[field.name])
            kind = next((k for k in samples if k.__name__ in hint), str)
            if "list" in hint:
                text, yaml, value = "x", "[x]", ["x"]
            else:
                text, yaml, value = samples[kind]
            flag = "--" + field.name.replace("_", "-")
            title = next(t for t, c in GROUPS.items() if c is cls)
            by_flag = read(flag, *([text] if text else []))
            by_yaml = read(yaml=f"{field.name}: {yaml}\n", tmp_path=tmp_path)
            assert getattr(getattr(by_flag, title), field.name) == value, flag
            assert by_flag == by_yaml, flag


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("num_zero_expert: 4", ["run.yaml", "unknown key 'num_zero_expert'", "'num_zero_experts'"]),
        ("zzz: 4", ["run.yaml", "unknown key 'zzz'"]),
        ("seq_length: long", ["run.yaml", "'seq_length' wants int", "'long'"]),
        ("seq_length: 3.5", ["'seq_length' wants int", "3.5"]),
        ("seq_length: true", ["'seq_length' wants int", "True"]),
        ("bf16: 1", ["'bf16' wants bool", "1"]),
        ("lr: fast", ["'lr' wants float", "'fast'"]),
        ("lr: true", ["'lr' wants float", "True"]),
        ("lr:", ["'lr'", "no value"]),
        ("save: [a, b]", ["'save' wants str"]),
        ("data_path: [a, [b]]", ["'data_path'", "['b']"]),
        ("lr: 1\nlr: 2", ["run.yaml line 2", "'lr'", "twice"]),
        ("a: b: c", ["run.yaml line 1", "not valid YAML"]),
        ("- lr", ["run.yaml", "`name: value`"]),
        ("? [a, b]\n: 1", ["run.yaml line 1", "one word, not a sequence"]),
        ("lr: 1\n? {a: b}\n: 1", ["run.yaml line 2", "one word, not a mapping"]),
        ("a: &a [x, x]\nsave: [*a, *a]", ["run.yaml line 2", "alias *a"]),
        ("seed: !!int x", ["'seed' wants int", "'x'"]),
        ("lr: !!float x", ["'lr' wants float", "'x'"]),
        ("bf16: !!bool x", ["'bf16' wants bool", "'x'"]),
        ("save: !!set {a, b}", ["'save' wants str"]),
        ("save: !!python/object/apply:os.system [ls]", ["'save' wants str"]),
        pytest.param("seed: " + "9" * 5000, ["'seed'", "999...999"], id="5000 digits"),
        ("seed: " + "9" * 30, ["'seed' is too large", "'999999"]),
        pytest.param("lr: " + "9" * 5000, ["'lr' is not a finite number"], id="a float of 5000 digits"),
        ("lr: .nan", ["'lr' is not a finite number"]),
        pytest.param("save: " + "[" * 3000, ["run.yaml", "nested too deeply"], id="lists in lists"),
        pytest.param("save: " + "{a: " * 3000, ["run.yaml", "nested too deeply"], id="maps in maps"),
        ("save: ''", ["'save' is empty"]),
        ('save: "a\\0b"', ["'save' has a control character", r"'a\x00b'"]),
        ('save: "\\ud800"', ["'save' is no UTF-8 text"]),
        ("lr: 1\nsave: a\x01b", ["run.yaml line 2", "U+0001"]),
        ("sa\u202eve: 1", [r"unknown key 'sa\u202eve'", "'save'"]),
        pytest.param("x" * 9_000_000, ["run.yaml", "longer than 262144 bytes"], id="a line of 9 MB"),
        pytest.param("x" * 900 + ": 1", ["unknown key 'xxx", "...xxx"], id="a long key"),
        ("micro_batch_size: 2", ["run.yaml: micro_batch_size 2", "one packed row"]),
        ("sequence_parallel: false", ["sequence_parallel false", "--tensor-model-parallel-size"]),
        ("teacher_load: a\nexport_kd_teacher_load: b", ["run.yaml line 2", "given twice"]),
    ],
)
def test_mistakes_in_yaml_are_user_errors_that_name_file_and_key(tmp_path, yaml, words):
    with pytest.raises(UserError) as caught:
        read(yaml=yaml, tmp_path=tmp_path)
    told = str(caught.value)
    assert all(word in told.replace("9" * 16, "999") for word in words) and told.isprintable()
    assert len(told.replace(str(tmp_path), "")) < 300  # values are cut


def test_text_stays_as_it_is_written(tmp_path):
    yaml = "save: 2024-99-99\nstage: 01\ndata_path: [1, 2.50, 0x1f, 2024-01-01]\nhf_config: 1e3\n"
    options = read(yaml=yaml, tmp_path=tmp_path)
    assert (options.run.save, options.model.stage, options.model.hf_config) == ("2024-99-99", "01", "1e3")
    assert options.data.data_path == ["1", "2.50", "0x1f", "2024-01-01"]


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(UserError, match="is not a plain file"):
            read("--config", str(file))


def test_what_megatron_users_type_by_habit_is_understood(tmp_path):
    so_anyway = [
        "--sequence-parallel",
        "--moe-grouped-gemm",
        "--micro-batch-size",
        "1",
        "--hidden-dropout",
        "0.0",
    ]
    assert read(*so_anyway, "--ckpt-format=torch_dist") == read()
    assert read(yaml="sequence-parallel: true\nmicro_batch_size: 1\n", tmp_path=tmp_path) == read()
    assert read("--export-kd-teacher-load", "x").distill.teacher_load == "x"
    assert read("--train-data-path", "a", "b") == read("--data-path", "a", "b")
    virtual = "virtual_pipeline_model_parallel_size"
    options = read(yaml="num_virtual_stages_per_pipeline_rank: 2\n", tmp_path=tmp_path)
    assert getattr(options.parallel, virtual) == 2
    for argv, words in (
        (["--micro-batch-size", "2"], "--micro-batch-size 2: a micro-batch is one packed row"),
        (["--hidden-size", "64"], "--hidden-size 64: is read from the model's config.json"),
        (["--fp16"], "--fp16: half precision is --bf16"),
    ):
        with pytest.raises(UserError, match=words):
            read(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "9" * 30], ["--seed", "too large", "'999"]),
        (["--lr", "nan"], ["--lr", "not a finite number"]),
        (["--save", ""], ["--save", "is empty"]),
        (["--save", "a\udcffb"], ["--save", "no UTF-8"]),
        (["--qq" + "q" * 5000], ["unknown argument --qqq", "...qqq"]),
        (["--num-zero-expert", "4"], ["--num-zero-expert", "did you mean --num-zero-experts"]),
        (["--num_zero_experts", "4"], ["--num_zero_experts", "did you mean --num-zero-experts"]),
        (["--qqqqqq", "4"], ["--qqqqqq"]),
        (["--group-loss-budget", "model"], ["unknown argument --group-loss-budget"]),
        (["stray"], ["stray"]),
        (["--seq-length", "long"], ["--seq-length", "'long'"]),
        (["--seq-length"], ["--seq-length"]),
        (["--config", "/nowhere.yaml"], ["--config /nowhere.yaml", "no such file"]),
        (["--config", "/"], ["--config /", "cannot be read"]),
    ],
)
def test_mistakes_on_the_command_line_are_user_errors(argv, words):
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_none_is_a_value_only_where_a_field_may_have_none(tmp_path):
    assert read(yaml="num_zero_experts: null\nsave: null\n", tmp_path=tmp_path) == read()


@pytest.mark.parametrize(
    ("cls", "field"), FIELDS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", ""))
)
def test_every_field_has_a_docstring(cls, field):
    assert len(field_docs(cls).get(field.name, "")) > 3


def test_help_shows_text_and_default_of_every_flag(capsys):
    with pytest.raises(SystemExit) as done:
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for cls in GROUPS.values():
        for name, text in field_docs(cls).items():
            assert "--" + name.replace("_", "-") in shown
            assert text.split()[0] in shown
    assert "default: 2e-05" in shown and "default: None" not in shown
    assert "--stage {pretrain,0,1,2,eval}" in shown and "--zero-share-range LOW [HIGH ...]" in shown


def test_help_of_a_field_that_makes_its_default_shows_no_machinery(capsys):
    from zeda_megatron.evaluation.quality.hf_quality import QualityOptions

    with pytest.raises(SystemExit):
        parse(["--help"], {"quality": QualityOptions})
    shown = capsys.readouterr().out
    assert "MISSING" not in shown and "object at" not in shown and "--dtype {fp32,bf16}" in shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--data-path is missing"]),
        (["--stage", "3"], ["--stage '3'", "pretrain, 0, 1"]),
        (["--stage", "0"], ["--rollout-path is missing"]),
        (["--train-iters", "0"], ["--train-iters 0"]),
        (["--global-batch-size", "-1"], ["--global-batch-size -1"]),
        (["--teacher-memory", "shared"], ["--teacher-memory shared", "--trainable router"]),
        (["--teacher-memory", "disk"], ["--teacher-memory 'disk'", "own, offload, shared"]),
        (["--overlong", "x"], ["--overlong 'x'"]),
        (["--lr-decay-style", "x"], ["--lr-decay-style 'x'"]),
        (["--lr", "-1"], ["--lr -1"]),
        (["--min-lr", "1"], ["--min-lr 1", "--lr"]),
        (["--lr-warmup-fraction", "1.0"], ["--lr-warmup-fraction 1.0"]),
        (
            ["--moe-router-load-balancing-type", "x"],
            ["--moe-router-load-balancing-type 'x'", "grouped_aux_loss"],
        ),
        (
            ["--moe-token-dispatcher-type", "x"],
            ["--moe-token-dispatcher-type 'x'", "alltoall, allgather, flex"],
        ),
        (
            ["--moe-token-dispatcher-type", "flex"],
            ["--moe-token-dispatcher-type flex", "deep_ep", "github.com/deepseek-ai/DeepEP", "use alltoall"],
        ),
        (
            ["--moe-flex-dispatcher-backend", "x"],
            ["--moe-flex-dispatcher-backend 'x'", "deepep, hybridep"],
        ),
        (["--recompute-granularity", "some"], ["--recompute-granularity 'some'", "full, selective"]),
        (["--distill-loss", "kl"], ["--distill-loss", "'kl'", "forward_kl"]),
        (["--zero-experts-type", "x"], ["--zero-experts-type 'x'", "zero, copy, learned"]),
        (["--expert-backend", "x"], ["--expert-backend 'x'"]),
        (["--moe-permute-fusion"], ["--moe-permute-fusion", "Transformer Engine", "leave the flag out"]),
        (["--group-loss-variant", "x"], ["--group-loss-variant 'x'"]),
        (
            ["--context-parallel-size", "2", "--seq-length", "126"],
            ["--seq-length", "--context-parallel-size"],
        ),
        (["--context-parallel-size", "2", "--pad-seq-to-mult", "6"], ["--pad-seq-to-mult"]),
        (["--virtual-pipeline-model-parallel-size", "2"], ["--virtual-pipeline-model-parallel-size"]),
        (["--decoder-last-pipeline-num-layers", "1"], ["--decoder-last-pipeline-num-layers 1", "above 1"]),
        (
            ["--decoder-first-pipeline-num-layers", "0", "--pipeline-model-parallel-size", "2"],
            ["--decoder-first-pipeline-num-layers 0", "at least 1"],
        ),
        (["--teacher-schedule", "behind"], ["--teacher-schedule"]),
        (
            ["--teacher-schedule", "alongside", "--teacher-memory", "offload"],
            ["--teacher-schedule alongside", "--teacher-memory offload", "use ahead"],
        ),
        (["--tensor-model-parallel-size", "2", "--seq-length", "33"], ["--seq-length 33", "2"]),
        (["--save-interval", "-1"], ["--save-interval -1"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size 0", "at least 1"]),
        (["--context-parallel-size", "-2"], ["--context-parallel-size -2", "at least 1"]),
        (["--distributed-timeout-minutes", "1e30"], ["--distributed-timeout-minutes", "a year"]),
        (["--adam-beta2", "1"], ["--adam-beta2 1.0", "below 1"]),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_built(argv, words):
    argv = argv if argv == [] else [*argv, "--data-path", "a.jsonl"]
    with pytest.raises(UserError) as caught:
        options = read(*argv)
        options.validate()
        check_machine(options)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_sane_options_pass():
    read("--data-path", "a.jsonl").validate()
    check_machine(read("--data-path", "a.jsonl"))
    read("--data-path", "a.jsonl", "--stage", "0", "--rollout-path", "b.jsonl").validate()
    assert isinstance(read().parallel, ParallelConfig)


def test_settings_need_no_torch():
    code = "import sys, zeda_megatron.config.options, zeda_megatron.config.fit; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
