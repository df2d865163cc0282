"""Arms beside their teacher, alone and several in a process; KL on the student's own answers."""

import json
from contextlib import nullcontext

import pytest
import tiny_world

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.teacher import Teacher
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality import measure
from zeda_megatron.evaluation.quality.heldout import load_held_out
from zeda_megatron.evaluation.quality.measure import own_answers
from zeda_megatron.models.load import load_model
from zeda_megatron.moe.router_dials import set_dials
from zeda_megatron.moe.stats import routers

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def prompts(world):
    held_out = load_held_out(str(world.heldout), load_tokenizer(world.hf), 128)
    return held_out.prompts[:12]


def ask(world, prompts, mask):
    student, teacher = load_model(str(world.dynamic)), load_model(str(world.static))
    set_dials(student.chunk, zero_mask=mask)
    found = own_answers(student.chunk, Teacher([teacher.chunk], "own"), prompts, teacher.tokenizer, 128, 16)
    return found, student


def test_a_student_that_is_its_teacher_is_at_no_distance_on_its_answers(world, prompts):
    found, _ = ask(world, prompts, mask=True)
    assert abs(found["reverse_kl"]) < 1e-6 and found["tokens"] > 12


def test_it_is_the_loss_of_a_stage_2_step_on_the_same_answers(world):
    run = tiny_world.start(world, stage="2", global_batch_size=6, max_new_tokens=16, lr=0.0)
    step = run.feed.next_rows(0)
    metrics = run.stepper.step(step.rows, step.padding_factor)
    prompts = [run.feed.questions[run.feed.order[i]].ids for i in range(6)]
    found, student = ask(world, prompts, mask=False)
    assert all(router.routing_stats.slots is None for router in routers(student.chunk))
    assert metrics["tokens"] == found["tokens"]
    assert metrics["loss"] == pytest.approx(found["reverse_kl"], rel=1e-4)
    assert found["response_length"] == pytest.approx(step.metrics["response_length"])


@pytest.fixture
def distance(world, tmp_path, monkeypatch, capsys):
    """Runs the command; gives what it said on stdout and stderr."""
    monkeypatch.setattr(measure.process_groups, "started", nullcontext)
    common = ["--teacher", world.static, "--heldout", world.heldout, "--calibration", world.rollouts]
    common += ["--seq-length", 128, "--max-new-tokens", 4]

    def run(*words):
        assert measure.main([str(word) for word in (*common, *words)]) == 0
        return capsys.readouterr()

    return run


def test_several_arms_of_a_process_get_the_figures_that_each_gets_alone(
    world, tmp_path, distance, monkeypatch
):
    arms = {
        "teacher": [],
        "shared": ["--student", world.dynamic, "--own-answers", 3, "--own-answer-tokens", 8],
        "dial": ["--student", world.dynamic, "--zero-dial", "auto"],
        "rule": ["--moe-pick-rule", "skip"],  # of the teacher itself
        "plain": ["--student", world.static],
    }
    alone = {}
    for name, flags in arms.items():
        said = distance(*flags, "--out", tmp_path / f"{name} alone.json")
        alone[name] = json.loads((tmp_path / f"{name} alone.json").read_text())
        assert not said.out
        (line,) = said.err.splitlines()
        assert line.startswith(f"wrote {tmp_path / name} alone.json: KL ")
    assert json.loads(distance("--student", world.static).out) == alone["plain"]
    lines = [
        " ".join(map(str, [*flags, "--out", f"'{tmp_path / name} together.json'"]))
        for name, flags in arms.items()
    ]
    (tmp_path / "arms").write_text("# one a line\n\n" + "\n".join(lines) + "\n")
    passes = []
    hidden_states = Teacher.hidden_states
    monkeypatch.setattr(Teacher, "hidden_states", lambda *args: passes.append(args) or hidden_states(*args))
    said = distance("--arms", tmp_path / "arms")
    assert said.out == "" and len(said.err.splitlines()) == len(arms)
    for name in arms:
        assert json.loads((tmp_path / f"{name} together.json").read_text()) == alone[name], name
    held_out = load_held_out(str(world.heldout), load_tokenizer(world.hf), 128)
    rows = sum(map(len, held_out.rows_by_kind.values()))
    own = [args for args in passes if not any(args[1][0] is row for row in args[0]._rows)]
    assert len(passes) - len(own) == rows  # once for all arms


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "names no arm"),
        ("--student a", "line 1: needs an --out of its own"),
        ("--out a\n--out a", "line 2: needs an --out of its own"),
        ("--out a --sudent b", "line 1: unknown argument --sudent; did you mean --student"),
        ("--out a --teacher b", "line 1: --teacher is one for all arms"),
        ("--out 'a", "line 1: No closing quotation"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_line_of_arms_is_named(tmp_path, lines, told):
    file = tmp_path / "arms"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(UserError, match=f"^--arms {file}.*{told}"):
        measure.read_arms(["--teacher", "t", "--heldout", "h", "--arms", str(file)])


def test_no_progress_is_one_of_its_flags_and_a_terminal_sees_a_bar_without_it(
    world, distance, monkeypatch, tmp_path
):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for flags, shown in (([], True), (["--no-progress"], False)):
        said = distance("--out", tmp_path / "out.json", "--limit", 1, *flags)
        assert ("static: 100%" in said.err) is shown
