"""Answers that are on the disk are taken by the student that gave them, and by nobody else."""

import pytest
import tiny_world
import torch

from zeda_megatron.distill.answers import Asked, Generation
from zeda_megatron.training.kept_answers import NAME, KeptAnswers, student_id

ASKED = [Asked([5, 6], stream) for stream in (3, 4, 5)]
MADE = Generation([7, 8], [-0.5, -1.25], "stop")


def known(folder, student="me"):
    return KeptAnswers(folder).of(student, ASKED)


def test_they_come_back_as_they_were_for_the_same_student_and_stream(tmp_path):
    kept = KeptAnswers(tmp_path)
    kept.keep("me", 2, [(4, MADE), (9, MADE)])
    kept.keep("you", 2, [(3, MADE)])
    assert known(tmp_path) == {4: MADE} and known(tmp_path, "you") == {3: MADE}
    assert known(tmp_path, "nobody") == {}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        "null",
        "\udcff",
        '{"student":"me","version":1,"stream":4,"ids":[],"logprobs":[],"finish":"stop"}',
        '{"student":"me","version":1,"stream":4,"ids":[1],"logprobs":[],"finish":"stop"}',
        '{"student":"me","version":1,"stream":4,"ids":[-1],"logprobs":[-1.0],"finish":"stop"}',
        '{"student":"me","version":1,"stream":4,"ids":[1],"logprobs":[NaN],"finish":"stop"}',
        '{"student":"me","version":1,"stream":4,"ids":[1],"logprobs":[-1.0],"finish":"tired"}',
        '{"student":"me","version":1,"stream":"4","ids":[1],"logprobs":[-1.0],"finish":"stop"}',
    ],
)
def test_a_line_that_is_cut_off_or_says_something_else_is_not_taken_and_spoils_no_other(tmp_path, line):
    (tmp_path / NAME).write_bytes(line.encode(errors="surrogateescape"))
    KeptAnswers(tmp_path).keep("me", 1, [(5, MADE)])
    assert known(tmp_path) == {5: MADE}


def test_what_is_older_than_the_oldest_checkpoint_is_dropped(tmp_path):
    kept = KeptAnswers(tmp_path)
    for version, stream in ((1, 3), (4, 4), (6, 5)):
        kept.keep("me", version, [(stream, MADE)])
    kept.forget()
    assert set(known(tmp_path)) == {3, 4, 5}  # no checkpoint: the run would begin anew
    for step in (4, 6):
        (tmp_path / f"iter_{step:07d}").mkdir()
    kept.forget()
    assert set(known(tmp_path)) == {4, 5}


def test_a_student_is_told_by_its_weights_and_by_how_it_is_sampled():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert student_id([one], "greedy") == student_id([other], "greedy") != student_id([one], "hot")
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(9.0))
    assert student_id([one], "greedy") != student_id([other], "greedy")
    other.bias.requires_grad = False  # what does not train tells no student from another
    one.bias.requires_grad = False
    assert student_id([one], "greedy") == student_id([other], "greedy")


def test_a_run_of_the_built_in_engine_that_was_killed_asks_it_for_nothing_twice(
    one_process, world, tmp_path, monkeypatch
):
    """Killed after it had answered for step 4; its checkpoint is of step 2."""
    flags = {
        "stage": "2",
        "train_iters": 4,
        "global_batch_size": 4,
        "samples_per_prompt": 2,
        "save_interval": 2,
    }
    whole = tiny_world.start(world, save=tmp_path / "whole", **flags)
    whole.run()
    assert len((tmp_path / "whole" / NAME).read_text().split()) == 8, "those of steps 3 and 4"

    run = tiny_world.start(world, save=tmp_path / "parts", **flags)
    step = run.stepper.step

    def killed(*args, **kwargs):
        if run.iteration == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(run.stepper, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = tiny_world.start(world, save=tmp_path / "parts", load=tmp_path / "parts", **flags)
    asked, generate = [], again.feed.engine.generate

    def counting(prompts, *args, **kwargs):
        asked.extend(prompts)
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(again.feed.engine, "generate", counting)
    again.run()
    assert asked == [], "steps 3 and 4 had been answered"
    assert tiny_world.read_metrics(tmp_path / "parts") == tiny_world.read_metrics(tmp_path / "whole")


def test_a_part_of_a_round_is_not_taken_from_an_engine_that_answers_a_batch(
    one_process, world, tmp_path, monkeypatch
):
    """Together with others an answer may round differently: the resumed run would not be the uninterrupted one."""
    flags = {"stage": "2", "train_iters": 2, "global_batch_size": 4, "samples_per_prompt": 2}
    run = tiny_world.start(world, save=tmp_path / "run", **flags)
    run.run()
    lines = (tmp_path / "run" / NAME).read_text().splitlines(keepends=True)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / NAME).write_text(
        "".join(lines[:-1])
    )  # the last one of the second round was cut off
    again = tiny_world.start(world, save=tmp_path / "again", **flags)
    asked, generate = [], again.feed.engine.generate

    def counting(prompts, *args, **kwargs):
        asked.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(again.feed.engine, "generate", counting)
    again.run()
    assert asked == [4]
    assert tiny_world.read_metrics(tmp_path / "again") == tiny_world.read_metrics(tmp_path / "run")
