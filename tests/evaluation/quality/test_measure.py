"""KL on the student's own answers."""

import pytest
import tiny_world

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.teacher import Teacher
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
