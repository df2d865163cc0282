"""The examples: recipes, scripts and walks are understood by the programs they name, tables are what tools print."""

import json
import re
from pathlib import Path

import pytest
from page_commands import LAUNCH, check, commands, program, without_variables

from zeda_megatron.config.arguments import parse
from zeda_megatron.config.options import GROUPS, Options, read_options
from zeda_megatron.data.records import parse_prompt, parse_rollout
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.build import check_layout
from zeda_megatron.planning import step_plan as plan
from zeda_megatron.planning.memory_sheet import COLUMNS, markdown_row, memory_sheet, read_command
from zeda_megatron.training.build_feed import prepare_feed

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_scripts() -> list:
    """(script, words) of every command in a script that starts training or one of the programs here."""
    return [
        pytest.param(words, id=f"{name(script)}:{' '.join(words)[:60]}")
        for script in SCRIPTS
        for words in commands(script.read_text(), True)
        if program(words)
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_yaml_file_is_understood(config):
    rest = ["--data-path", "x.jsonl", "--rollout-path", "y.jsonl"]
    Options(**parse(["--config", str(config), *rest], GROUPS)).validate()


@pytest.mark.parametrize("words", of_scripts())
def test_every_command_of_the_examples_scripts_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(words)


LARGE = ("qwen3_30b_a3b", "glm_4_7_flash")


@pytest.mark.parametrize("example", LARGE)
def test_the_walk_of_a_large_example_is_complete(example):
    """Convert, stage 0, fit, stages 1 and 2, export, each with the flags it cannot do without; lines for Slurm."""
    page = (ROOT / "examples" / example / "README.md").read_text()
    steps = [program(words) for words in commands(page, False) if program(words)]
    order = [arguments[0] if file.startswith("tools/check") else file for file, arguments in steps]
    walk = [
        "hf-to-megatron",
        "verify",
        LAUNCH,
        "tools/fit_zero_rows.py",
        "tools/plan.py",
        LAUNCH,
        LAUNCH,
        "megatron-to-hf",
    ]
    assert order[: len(walk)] == walk
    arch = read_architecture(ROOT / "examples" / example)
    for file, arguments in steps:
        if file == LAUNCH:
            options = Options(**parse(without_variables(arguments), GROUPS))
            options.validate()
            check_layout(arch, options.parallel)
            assert options.model.pretrained_checkpoint
            assert options.model.stage == "0" or options.run.save
            assert options.model.stage != "2" or options.distill.teacher_load
    assert any(words[0] == "srun" for words in commands(page, False))


@pytest.mark.parametrize("example", LARGE)
def test_the_memory_table_is_what_the_tool_prints(example):
    page = (ROOT / "examples" / example / "README.md").read_text()
    table = page.split("<!-- memory table: begin -->")[1].split("<!-- memory table: end -->")[0]
    rows = [re.match(r"\| (\d+) × (\d+) GB \| `(.*?)` \| (.*) \|$", line) for line in table.split("\n")]
    rows = [row.groups() for row in rows if row]
    assert {(gpus, size) for gpus, size, *_ in rows} == {
        *(("1", "80"), ("2", "48"), ("8", "24"), ("8", "80"), ("16", "80"), ("8", "141"))
    }
    for gpus, size, words, cells in rows:
        file, *flags = words.split()
        config = str(ROOT / "examples" / example / file)
        command = read_command(["--hf", str(ROOT / "examples" / example), "--config", config, *flags])
        assert (command.about.gpus, command.about.gpu_memory) == (int(gpus), int(size) - 1)
        assert markdown_row(memory_sheet(command)) == cells, words
        assert cells.count("|") == len(COLUMNS)


@pytest.mark.parametrize("example", LARGE)
def test_the_papers_stage_1_is_what_the_file_says(example):
    options = Options(**parse(["--config", str(ROOT / "examples" / example / "stage1.yaml")], GROUPS))
    optimizer, model = options.optimizer, options.model
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_fraction) == (2e-5, 0.0, 0.1)
    assert (optimizer.weight_decay, optimizer.adam_beta1, optimizer.adam_beta2) == (0.1, 0.9, 0.98)
    assert (model.moe_zero_expert_weight, model.moe_aux_loss_coeff) == (2.0, 0.1)
    assert options.data.seq_length == 65536
    assert optimizer.train_iters == -(-60_000 // 128)


@pytest.mark.parametrize("example", LARGE)
def test_the_papers_stage_2_is_what_the_file_says(example):
    options = Options(**parse(["--config", str(ROOT / "examples" / example / "stage2.yaml")], GROUPS))
    assert (options.optimizer.train_iters, options.optimizer.global_batch_size) == (321, 16 * 2)
    generate = options.generate
    assert (generate.samples_per_prompt, generate.max_new_tokens, generate.temperature) == (2, 32768, 1.0)
    assert generate.steps_per_round(options.optimizer.global_batch_size) == 1
    assert options.loss().kind == "reverse_kl"


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_documented_lines_of_data_are_read(page):
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [json.loads(line) for block in blocks for line in block.splitlines() if line.strip()]
    asked = [
        line for line in lines if '"assistant"' not in str(line).replace("'", '"') and "gpt" not in str(line)
    ]
    assert len(lines) > len(asked) > 0
    for line in lines:
        messages = (parse_prompt if line in asked else parse_rollout)(line, page).messages
        assert messages[-1]["role"] == ("user" if line in asked else "assistant")


@pytest.fixture
def planned(tmp_path, capsys, monkeypatch):
    """What tools/plan.py says of eight conversations of 25 tokens, given flags: (flags to use, lines to a human)."""
    ids = {"prompt_ids": [5] * 10, "response_ids": [6] * 15}
    line = json.dumps({"messages": [{"role": "user", "content": "a"}]} | ids) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 8)
    tokenizer = ROOT / "examples" / "quickstart" / "teacher"

    def _run(*flags, data=None):
        paths = ["--data-path", str(data or tmp_path / "a.jsonl"), "--tokenizer-model", str(tokenizer)]
        assert plan.main([*paths, "--seq-length", "80", *flags]) == 0
        said = capsys.readouterr()
        return said.out, said.err

    return _run


def test_plan_counts_rows_as_training_packs_them(planned, tmp_path):
    """Three of the conversations to a row of 80 tokens: three rows; padded to 32, two to a row: four."""
    flags, said = planned("--conversations", "6")
    assert flags == "--global-batch-size 2 --train-iters 2\n"
    assert "8 conversations, 25 tokens on average, longest 25; 3 rows of 80" in said and "warning" not in said
    assert "for 1 data-parallel rank (--data-parallel-size)" in said
    for more in (["--pad-seq-to-mult", "32", "--seq-length", "64"], ["--context-parallel-size", "20"]):
        assert "; 4 rows of" in planned("--conversations", "2", *more)[1]
    assert planned("--conversations", "2", "--data-parallel-size", "3")[0] == (
        "--global-batch-size 3 --train-iters 1\n"
    )
    long = json.dumps(
        {"messages": [{"role": "user", "content": "a"}], "prompt_ids": [5] * 90, "response_ids": [6]}
    )
    (tmp_path / "long.jsonl").write_text((tmp_path / "a.jsonl").read_text() + long + "\n")
    for refused, why in (("3", "--seq-length 80 must be a multiple of 3"), ("-1", "must not be negative")):
        with pytest.raises(UserError, match=why):
            planned("--pad-seq-to-mult", refused)
    with pytest.raises(UserError, match="sample 9 has 91 tokens"):
        planned(data=tmp_path / "long.jsonl")
    said = planned("--overlong", "skip", data=tmp_path / "long.jsonl")[1]
    assert "1 of 9 conversations left out" in said and "8 conversations, 25 tokens" in said


@pytest.mark.parametrize(
    ("layout", "padded"),
    [
        (["--context-parallel-size", "2"], 28),
        (["--pad-seq-to-mult", "40"], 40),
        (["--context-parallel-size", "2", "--pad-seq-to-mult", "16"], 32),
    ],
)
def test_the_plans_steps_are_one_epoch_of_what_the_training_is_fed(
    planned, layout, padded, tmp_path, one_process
):
    """Padded to a multiple, two of the conversations fill a row of 80 tokens, not three."""
    flags, said = planned("--conversations", "4", *layout)
    model = str(ROOT / "examples" / "quickstart" / "teacher")
    words = ["--data-path", str(tmp_path / "a.jsonl"), "--hf-config", model, "--seq-length", "80", *layout]
    options = read_options([*words, *flags.split()], "zeda train")
    options.validate()
    feed = prepare_feed(options)(None)
    rows = [row for step in range(options.optimizer.train_iters) for row in feed.next_rows(step).rows]
    assert [row.cu_seqlens.tolist() for row in rows] == [
        [0, padded, 2 * padded, 80][: 4 - (padded == 40)]
    ] * 4
    assert "8 conversations" in said and "; 4 rows of 80" in said
    assert feed.size == 8 and feed.dataset.rows_in_epoch(0) == len(rows)


def test_plan_says_if_one_step_takes_more_than_there_is(planned):
    flags, said = planned("--conversations", "16")
    assert flags == "--global-batch-size 6 --train-iters 1\n"
    assert "warning: one step takes 6 rows and the files give 3" in said


def test_plan_takes_the_tokenizer_and_the_template_of_the_training(planned, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        + "\n"
    )
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    said = planned("--chat-template-file", str(tmp_path / "t.jinja"), data=tmp_path / "text.jsonl")[1]
    assert "4 tokens on average" in said
