"""Guard rails end a run at the right step and leave the checkpoint of before; what they remember is resumed."""

import itertools
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tiny_world
import torch

from zeda_megatron.checkpoint.state import find_checkpoint
from zeda_megatron.config.guard import GuardOptions
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.training.guards import Guards, GuardTripped
from zeda_megatron.training.loop import TrainingRun

pytestmark = pytest.mark.usefixtures("one_process")
STEPS = {"train_iters": 8, "lr_warmup_fraction": 0.0, "lr_decay_style": "constant", "global_batch_size": 2}
SHARE = STEPS | {"moe_aux_loss_coeff": 10.0, "trainable": "router", "lr": 3e-3}
"""The zero share goes up from step to step."""
APART = STEPS | {"distill_loss": "ce", "lr": 2e-2, "eval_rows": 2, "eval_interval": 1}
"""The student learns other text than its teacher's: their KL rises."""
LENGTHS = [20.0, 22.0, 21.0, 19.0, 12.0, 9.0, 8.0, 8.0]


class FreeRun:
    """A run without guards: its metrics, its end, and the flags that make it."""

    def __init__(self, world, folder, flags):
        self.flags = flags
        run = tiny_world.start(world, save=folder, **flags)
        run.run()
        self.lines, self.end = tiny_world.read_metrics(folder), tiny_world.snapshot(run)


@pytest.fixture(scope="module")
def share_run(one_process, world, tmp_path_factory):
    return FreeRun(world, tmp_path_factory.mktemp("share"), SHARE)


@pytest.fixture(scope="module")
def apart_run(one_process, world, tmp_path_factory):
    return FreeRun(world, tmp_path_factory.mktemp("apart"), APART)


def share_guard(free, window=2):
    """(flags, step, words): a band that the mean share leaves in the sixth step and not before."""
    shares = [line["zero_share"] for line in free.lines]
    means = {i + 1: sum(shares[i + 1 - window : i + 1]) / window for i in range(window - 1, len(shares))}
    before = max(mean for step, mean in means.items() if step < 6)
    assert before < means[6]
    high = (before + means[6]) / 2
    flags = {"zero_share_band": (0.0, high), "guard_window": window}
    return flags, 6, rf"the mean zero share of the last {window} steps is {means[6]:.4f}, --zero-share-band"


def kl_guard(free, most=3):
    """(flags, step, words): so many rises in a row."""
    series = [free.lines[0]["eval_start_kl"], *(line["eval_kl"] for line in free.lines)]
    rises = [after > before for before, after in itertools.pairwise(series)]
    step = next(i + 1 for i in range(len(rises)) if i + 1 >= most and all(rises[i + 1 - most : i + 1]))
    assert step < STEPS["train_iters"]
    flags = {"max_kl_rises": most}
    words = (
        rf"rose in {most} evaluations in a row, from .* to {series[step]:.4g}, and --max-kl-rises is {most}"
    )
    return flags, step, words


def trips(world, folder, flags, step, words):
    """Start (or resume) in `folder`; the guard must trip at that step. Returns what it said."""
    run = tiny_world.start(world, save=folder, **flags)
    with pytest.raises(GuardTripped, match=rf"^step {step}: .*{words}") as caught:
        run.run()
    assert "\n" not in str(caught.value) and run.iteration == step
    return str(caught.value)


def assert_goes_on(world, folder, free, saved):
    """The newest checkpoint is of that step, is whole, and without the guard leads to the end of the free run."""
    assert find_checkpoint(folder).name == f"iter_{saved:07d}"
    run = tiny_world.start(world, save=folder, **free.flags)
    assert run.iteration == saved and run.run() == 0
    end = tiny_world.snapshot(run)
    assert [name for name in free.end if not torch.equal(free.end[name], end[name])] == []
    assert tiny_world.read_metrics(folder) == free.lines


@pytest.mark.parametrize(
    ("name", "make", "background"),
    [
        pytest.param("share_run", share_guard, False, id="share-sync"),
        pytest.param("apart_run", kl_guard, True, id="kl-async", marks=pytest.mark.slow),
        pytest.param("share_run", share_guard, True, id="share-async", marks=pytest.mark.slow),
        pytest.param("apart_run", kl_guard, False, id="kl-sync", marks=pytest.mark.slow),
    ],
)
def test_a_guard_trips_at_its_step_and_leaves_the_checkpoint_of_before(
    world, tmp_path, request, name, make, background
):
    free = request.getfixturevalue(name)
    guard, step, words = make(free)
    flags = free.flags | guard | {"save_interval": 1, "async_save": background}
    told = trips(world, tmp_path, flags, step, words)
    assert f"iter_{step - 1:07d} is the last checkpoint; this step is not saved" in told
    assert tiny_world.read_metrics(tmp_path) == free.lines[:step]
    assert trips(world, tmp_path, flags, step, words) == told  # resumed with the same flags
    assert_goes_on(world, tmp_path, free, step - 1)


@pytest.mark.parametrize(
    ("name", "make", "stop"),
    [
        ("share_run", share_guard, 2),
        ("share_run", share_guard, 5),
        ("apart_run", kl_guard, 1),
        ("apart_run", kl_guard, 2),
    ],
)
def test_a_resumed_run_trips_where_the_uninterrupted_one_does(world, tmp_path, request, name, make, stop):
    """Stopped inside a window, or between two rises."""
    free = request.getfixturevalue(name)
    guard, step, words = make(free) if make is kl_guard else make(free, window=5)
    assert stop < step
    flags = free.flags | guard
    tiny_world.start(world, save=tmp_path, exit_interval=stop, **flags).run()
    told = trips(world, tmp_path, flags, step, words)
    assert f"iter_{stop:07d} is the last checkpoint" in told


def test_what_was_seen_before_a_guard_was_switched_on_counts(world, share_run, tmp_path):
    guard, step, words = share_guard(share_run, window=5)
    tiny_world.start(world, save=tmp_path, exit_interval=4, guard_window=5, **share_run.flags).run()
    trips(world, tmp_path, share_run.flags | guard, step, words)


@pytest.mark.parametrize(("name", "make"), [("share_run", share_guard), ("apart_run", kl_guard)])
def test_a_checkpoint_without_the_guards_memory_still_loads(
    world, tmp_path, monkeypatch, request, name, make
):
    free = request.getfixturevalue(name)
    guard, _, _ = make(free)
    old = tiny_world.start(world, save=tmp_path, exit_interval=2, **free.flags)
    state = old.state
    monkeypatch.setattr(
        old, "state", lambda *a, **k: {key: value for key, value in state(*a, **k).items() if key != "guards"}
    )
    old.run()
    run = tiny_world.start(world, save=tmp_path, **free.flags | guard)
    assert run.iteration == 2
    fresh = Guards(run.options.guard, run.evaluation.fingerprint)
    assert run.guards.state_dict() == fresh.state_dict()
    assert_goes_on(world, tmp_path, free, 2)


@pytest.mark.parametrize(("name", "make"), [("share_run", share_guard), ("apart_run", kl_guard)])
def test_a_guard_whose_limit_is_just_not_reached_changes_nothing(world, tmp_path, request, name, make):
    free = request.getfixturevalue(name)
    guard, step, _ = make(free)
    flags = free.flags | guard | {"train_iters": step - 1}
    assert tiny_world.start(world, save=tmp_path, **flags).run() == 0
    assert tiny_world.read_metrics(tmp_path) == free.lines[: step - 1]
    assert find_checkpoint(tmp_path).name == f"iter_{step - 1:07d}"


def test_an_evaluation_outside_the_band_trips_though_no_window_is_full(world, apart_run, tmp_path):
    share = apart_run.lines[1]["eval_zero_share"]
    start = apart_run.lines[0]["eval_start_zero_share"]
    band = (share + 1e-4, 1) if share < start else (0, share - 1e-4)
    flags = apart_run.flags | {"zero_share_band": band, "eval_interval": 2}
    trips(world, tmp_path, flags, 2, rf"the zero share on held-out text is {share:.4f}")
    assert find_checkpoint(tmp_path) is None


def test_a_run_that_saved_nothing_says_so_and_exits_with_2_in_one_line(world, capsys):
    flags = SHARE | {"zero_share_band": (0.99, 1), "guard_window": 1}
    run = tiny_world.start(world, **flags)
    with pytest.raises(SystemExit) as done:
        run_worker(run.run)
    assert done.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 1: " in line and "nothing was saved before; this step is not saved" in line


# --- response length: the metric comes from stage 2 ---------------------------------------------------------


def sampling_run(world, folder, exit_interval=0, **guard):
    """A run whose steps report the response lengths above."""
    options = tiny_world.options(world, save=folder, save_interval=1, exit_interval=exit_interval, **STEPS)
    run = TrainingRun(replace(options, guard=GuardOptions(guard_window=2, **guard)))
    step = run.stepper.step
    run.stepper.step = lambda *given: step(*given) | {"response_length": LENGTHS[run.iteration]}
    return run


@pytest.mark.parametrize("stop", [0, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_responses_that_collapse_end_the_run_and_leave_the_checkpoint_of_before(world, tmp_path, stop):
    """At first their mean is 21, at step 5 it is 15.5. The first window is remembered over a resume."""
    guard = {"min_response_length_share": 0.75}
    if stop:
        assert sampling_run(world, tmp_path, exit_interval=stop, **guard).run() == 0
    words = r"step 5: the mean response length of the last 2 steps is 15.5 tokens, 73.8% of the 21.0 of the first 2"
    with pytest.raises(GuardTripped, match=words) as caught:
        sampling_run(world, tmp_path, **guard).run()
    assert "--min-response-length-share" in str(caught.value) and "\n" not in str(caught.value)
    assert find_checkpoint(tmp_path).name == "iter_0000004"
    freed = sampling_run(world, tmp_path)
    assert freed.iteration == 4 and freed.run() == 0


# --- the guards alone ---------------------------------------------------------------------------------------


def tripped_at(options, series, fingerprint=None, start=None):
    """Step (from 1) at which guards end a run that shows these metrics."""
    guards = Guards(options, fingerprint)
    if start is not None:
        guards.start(start)
    for step, metrics in enumerate(series, 1):
        try:
            guards.after_step(step, {"zero_share": 0.5} | metrics)
        except GuardTripped:
            return step
    return None


@pytest.mark.parametrize(
    ("shares", "step"),
    [
        ([0.9, 0.9], None),  # the window is not full
        ([0.9, 0.9, 0.9], 3),
        ([0.9, 0.5, 0.4, 0.5, 0.6], None),  # one step outside is no mean outside
        ([0.5, 0.5, 0.5, 0.3, 0.2], 5),
        ([0.5, 0.5, float("nan")], 3),
    ],
)
def test_the_mean_of_a_full_window_must_stay_in_the_band(shares, step):
    options = GuardOptions(zero_share_band=["0.4", "0.6"], guard_window=3)
    assert tripped_at(options, [{"zero_share": share} for share in shares]) == step


@pytest.mark.parametrize(
    ("kls", "step"),
    [
        ([1.0, 1.1, 1.2], 3),  # the start, and two rises
        ([1.0, 1.1, 1.1, 1.2], None),  # equal is no rise
        ([1.0, 1.1, 0.9, 1.0, None, 1.1], 6),
        ([1.0, 1.1, float("nan")], 3),
    ],
)
def test_rises_are_counted_in_a_row_and_steps_without_evaluation_do_not_count(kls, step):
    series = [{} if kl is None else {"eval_kl": kl} for kl in kls]
    assert tripped_at(GuardOptions(max_kl_rises=2), series, "x") == step
    later = None if step is None else step - 1
    assert tripped_at(GuardOptions(max_kl_rises=2), series[1:], "x", start=series[0]) == later


@pytest.mark.parametrize(
    ("least", "step"), [(0.9, 5), (0.51, 6), (0.5, 7), (0.43, 7), (0.39, 8), (0.38, None)]
)
def test_the_mean_length_of_a_full_window_is_compared_with_the_first(least, step):
    """Means of two: 21, 21.5, 20, 15.5, 10.5, 8.5, 8."""
    options = GuardOptions(min_response_length_share=least, guard_window=2)
    assert tripped_at(options, [{"response_length": length} for length in LENGTHS]) == step


def test_the_evaluation_before_the_first_step_is_no_reason_to_end():
    options = GuardOptions(zero_share_band=["0.4", "0.6"])
    assert tripped_at(options, [{}], "x", start={"eval_kl": 1.0, "eval_zero_share": 0.0}) is None
    assert tripped_at(options, [{"eval_zero_share": 0.0}], "x") == 1


def test_kl_on_other_held_out_text_is_forgotten():
    first = Guards(GuardOptions(max_kl_rises=2), "some rows")
    first.start({"eval_kl": 1.0})
    first.after_step(1, {"zero_share": 0.5, "eval_kl": 1.1})
    for fingerprint, trips_now in (("some rows", True), ("other rows", False)):
        guards = Guards(GuardOptions(max_kl_rises=2), fingerprint)
        guards.load_state_dict(first.state_dict())
        try:
            guards.after_step(2, {"zero_share": 0.5, "eval_kl": 1.2})
            assert not trips_now
        except GuardTripped:
            assert trips_now


def test_all_guards_are_off_by_default():
    series = [{"zero_share": i % 2, "eval_kl": float(i), "eval_zero_share": 0.0} for i in range(30)]
    series = [metrics | {"response_length": 100.0 / (i + 1)} for i, metrics in enumerate(series)]
    assert tripped_at(GuardOptions(), series, "x") is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_share_band": ["0.4"]}, "--zero-share-band 0.4: give two numbers"),
        ({"zero_share_band": ["0.6", "0.4"]}, "--zero-share-band 0.6 0.4"),
        ({"zero_share_band": ["0.5", "0.5"]}, "LOW < HIGH"),
        ({"zero_share_band": ["-0.1", "0.5"]}, "--zero-share-band"),
        ({"zero_share_band": ["0.1", "1.5"]}, "--zero-share-band"),
        ({"zero_share_band": ["a", "b"]}, "--zero-share-band a b"),
        ({"zero_share_band": ["nan", "1"]}, "--zero-share-band"),
        ({"guard_window": 0}, "--guard-window 0 must be at least 1"),
        ({"max_kl_rises": -1}, "--max-kl-rises -1 must be at least 0"),
        ({"max_kl_rises": 2}, "--max-kl-rises 2 needs --eval-data-path"),
        ({"max_kl_rises": 2, "stage": "pretrain", "evaluates": True}, "--max-kl-rises 2 needs a teacher"),
        (
            {"min_response_length_share": 1.0, "stage": "2"},
            "--min-response-length-share 1.0 must be at least 0 and below 1",
        ),
        ({"min_response_length_share": -0.1, "stage": "2"}, "--min-response-length-share -0.1"),
        ({"min_response_length_share": 0.5}, "--min-response-length-share 0.5 is for --stage 2"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(options, words):
    stage, evaluates = options.pop("stage", "1"), options.pop("evaluates", False)
    with pytest.raises(UserError, match=words) as caught:
        GuardOptions(**options).validate(stage, evaluates)
    assert "\n" not in str(caught.value)


def test_sane_options_pass_and_the_run_checks_them(world):
    GuardOptions(zero_share_band=["0", "1"], max_kl_rises=1).validate("1", True)
    GuardOptions(min_response_length_share=0.5).validate("2", False)
    with pytest.raises(UserError, match="--max-kl-rises 1 needs --eval-data-path"):
        tiny_world.options(world, max_kl_rises=1)


def spoil(module, name, value=math.nan):
    """One element of one weight."""
    parameter = dict(module.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[3] = value


def before_step(run, step, do):
    """`do` comes first in the given step."""
    stock = run.stepper.step

    def spoiled(*given):
        if run.iteration + 1 == step:
            do()
        return stock(*given)

    run.stepper.step = spoiled


LAYER = "decoder.layers.1.self_attention.linear_proj.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"


@pytest.mark.parametrize(
    ("who", "value", "name"),
    [
        ("student", math.nan, LAYER),
        ("student", math.inf, ROUTER),
        ("teacher", math.nan, ROUTER),
        ("teacher", math.inf, LAYER),
        pytest.param("student", math.nan, ROUTER, marks=pytest.mark.slow),
        pytest.param("student", math.inf, LAYER, marks=pytest.mark.slow),
        pytest.param("teacher", math.nan, LAYER, marks=pytest.mark.slow),
        pytest.param("teacher", math.inf, ROUTER, marks=pytest.mark.slow),
    ],
)
def test_a_weight_that_is_no_number_ends_the_run_and_is_never_saved(
    world, halfway, tmp_path, who, value, name
):
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder, save_interval=1)
    chunk = (run.student.chunks if who == "student" else run.teacher.model_chunks)[0]
    before_step(run, 4, partial(spoil, chunk, name, value))
    with pytest.raises(UserError, match=rf"step 4: .* not finite: {who} {name}") as caught:
        run.run()
    assert "--no-check-for-nan-in-loss-and-grad" in str(caught.value) and "\n" not in str(caught.value)
    assert find_checkpoint(folder).name == "iter_0000003"
    assert tiny_world.start(world, save=folder).iteration == 3


def test_a_weight_that_no_token_has_met_is_found_before_it_is_saved(world, halfway, tmp_path):
    """The embedding of a token that is in no text: no loss ever shows it."""
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder)
    rows = run.student.chunks[0].embedding.word_embeddings.weight
    with torch.no_grad():
        rows[-1, 0] = math.nan
    with pytest.raises(UserError, match=r"step 6: a weight .*student embedding.word_embeddings.weight"):
        run.run()
    assert find_checkpoint(folder).name == "iter_0000002"


def test_a_gradient_that_is_no_number_ends_the_run_though_the_loss_is_one(world, halfway, tmp_path):
    folder = shutil.copytree(halfway, tmp_path / "run")
    run = tiny_world.start(world, save=folder)
    weight = dict(run.student.chunks[0].named_parameters())[LAYER]
    weight.register_hook(lambda gradient: gradient * (math.nan if run.iteration == 3 else 1))
    with pytest.raises(UserError, match=r"step 4: the gradient norm is nan.*lower --lr"):
        run.run()
    assert find_checkpoint(folder).name == "iter_0000002"


def test_the_check_can_be_switched_off(world, tmp_path):
    run = tiny_world.start(
        world, save=tmp_path, check_for_nan_in_loss_and_grad=False, train_iters=2, save_interval=1
    )
    spoil(run.student.chunks[0], LAYER)
    assert run.run() == 0
    assert [math.isnan(line["loss"]) for line in tiny_world.read_metrics(tmp_path)] == [True, True]
