"""Flags and YAML keys: one field each, the command line wins, every mistake is one clear line."""

import dataclasses

import pytest

from zeda_megatron.arguments import field_docs, parse
from zeda_megatron.config import ZeroExpertConfig
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.process_groups import ParallelConfig
from zeda_megatron.training.options import GROUPS, Options

FIELDS = [(cls, field) for cls in (*GROUPS.values(), ZeroExpertConfig) for field in dataclasses.fields(cls)]


def read(*argv, yaml=None, tmp_path=None):
    argv = list(argv)
    if yaml is not None:
        file = tmp_path / "run.yaml"
        file.write_text(yaml)
        argv = ["--config", str(file), *argv]
    return Options(**parse(argv, GROUPS))


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
            kind = next((k for k in samples if k.__name__ in str(field.type)), str)
            if "list" in str(field.type):
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
    ],
)
def test_mistakes_in_yaml_are_user_errors_that_name_file_and_key(tmp_path, yaml, words):
    with pytest.raises(UserError) as caught:
        read(yaml=yaml, tmp_path=tmp_path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-zero-expert", "4"], ["--num-zero-expert", "did you mean --num-zero-experts"]),
        (["--num_zero_experts", "4"], ["--num_zero_experts", "did you mean --num-zero-experts"]),
        (["--qqqqqq", "4"], ["--qqqqqq"]),
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
        (["--moe-permute-fusion"], ["--moe-permute-fusion", "Transformer Engine", "leave the flag away"]),
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
        (["--tensor-model-parallel-size", "2", "--seq-length", "33"], ["--seq-length 33", "2"]),
        (["--save-interval", "-1"], ["--save-interval -1"]),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_built(argv, words):
    argv = argv if argv == [] else [*argv, "--data-path", "a.jsonl"]
    with pytest.raises(UserError) as caught:
        read(*argv).validate()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_sane_options_pass():
    read("--data-path", "a.jsonl").validate()
    read("--data-path", "a.jsonl", "--stage", "0", "--rollout-path", "b.jsonl").validate()
    assert isinstance(read().parallel, ParallelConfig)
