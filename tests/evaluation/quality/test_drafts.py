"""Which drafts are accepted: against speculative decoding written out, one token after the other."""

import pytest
import tiny_mtp
import tiny_world
import torch

from zeda_megatron.convert.hf_to_megatron import hf_to_megatron
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.quality import drafts

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def glm():
    return tiny_mtp.WithHead(std=0.1, **tiny_world.MODEL)


@pytest.fixture(scope="module")
def world(glm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world = tiny_world.make_world(folder, tiny_mtp.WithHead)
    hf_to_megatron(world.hf, folder / "static mtp", mtp=True)
    hf_to_megatron(world.hf, folder / "dynamic mtp", num_zero_experts=4, mtp=True)
    return world


def measure(world, **values):
    fields = {"teacher": world.static.with_name("static mtp"), "heldout": world.heldout, "seq_length": 256}
    fields = {key: str(value) if key != "limit" else value for key, value in (fields | values).items()}
    numbers = {
        key: int(fields[key]) for key in ("seq_length", "own_answers", "own_answer_tokens") if key in fields
    }
    return drafts.measure_drafts(drafts.DraftOptions(**fields | numbers))


@torch.no_grad()
def decode(glm, prompt: list[int], longest: int, eos: set[int], vocab: int) -> tuple[list[int], int, int]:
    """The answer of greedy speculative decoding with one draft a step, the steps it took, the drafts it kept."""

    def greedy(tokens):
        return int(glm.model(torch.tensor([tokens])).logits[0, -1, :vocab].argmax())

    answer, steps, kept = [greedy(prompt)], 0, 0
    while answer[-1] not in eos and len(answer) < longest:
        tokens = prompt + answer
        draft = int(glm.draft_logits(torch.tensor(tokens))[-1].argmax())
        steps += 1
        answer.append(greedy(tokens))
        if answer[-1] == draft:
            kept += 1
            if answer[-1] not in eos and len(answer) < longest:
                answer.append(greedy(prompt + answer))
    return answer, steps, kept


def test_steps_on_own_answers_are_those_of_speculative_decoding(glm, world):
    found = measure(world, own_answers=6, own_answer_tokens=24)["teacher"]["own_answers"]
    model = drafts.load_model(str(world.static))
    held_out = drafts.load_held_out(str(world.heldout), model.tokenizer, 256, limit=200)
    prompts = held_out.prompts[:: len(held_out.prompts) // 6][:6]
    eos, vocab = set(model.tokenizer.eos_ids), min(model.tokenizer.vocab_size, 272)
    steps = kept = tokens = 0
    for prompt in prompts:
        answer, more, good = decode(glm, prompt, 24, eos, vocab)
        steps, kept, tokens = steps + more, kept + good, tokens + len(answer) - 1
    assert found["steps"] == steps and found["answers"] == 6
    assert found["acceptance"] == pytest.approx(kept / steps)
    assert found["accepted_length"] == pytest.approx(tokens / steps)


def test_acceptance_on_text_is_how_often_head_and_model_choose_alike(glm, world):
    found = measure(world)["teacher"]
    model = drafts.load_model(str(world.static))
    held_out = drafts.load_held_out(str(world.heldout), model.tokenizer, 256, limit=200)
    tokens = alike = 0
    for sample in held_out.samples:
        ids = torch.tensor(sample.tokens)
        with torch.no_grad():
            mine, theirs = glm.draft_logits(ids).argmax(-1), glm.model(ids[None]).logits[0].argmax(-1)
        for t in range(len(ids) - 2):
            if sample.is_response[t + 2]:
                tokens, alike = tokens + 1, alike + int(mine[t] == theirs[t + 1])
    assert found["tokens"] == tokens > 100
    assert found["acceptance"] == pytest.approx(alike / tokens) and found["zero_share"] == 0
    assert found["accepted_length"] == pytest.approx(1 + alike / tokens)


def test_a_student_is_measured_with_the_old_head_and_with_its_own(world, tmp_path):
    run = {"mtp_loss_scale": 1.0, "train_iters": 6, "teacher_load": world.static}
    start = world.dynamic.with_name("dynamic mtp")
    assert tiny_world.start(world, save=tmp_path / "run", pretrained_checkpoint=start, **run).run() == 0
    found = measure(world, student=tmp_path / "run")
    assert list(found) == ["teacher", "student, old head", "student, its own head"]
    old, own = found["student, old head"], found["student, its own head"]
    assert old["zero_share"] == own["zero_share"] > 0 and own["kl"] < old["kl"]
    assert [line.split("  ")[0] for line in drafts.format_drafts(found)] == ["drafts for", *found]
    # One that was trained without the head has the old one alone.
    assert list(measure(world, student=world.dynamic)) == ["teacher", "student, old head"]


def test_a_teacher_without_a_head_is_refused(world):
    with pytest.raises(UserError, match=r"--teacher .*: has no head of multi-token prediction"):
        measure(world, teacher=world.static)


@pytest.mark.parametrize(
    ("right", "steps", "kept"),
    [("", 0, 0), ("0", 1, 0), ("1", 1, 1), ("11", 1, 1), ("111", 2, 2), ("0110", 3, 1), ("1011", 2, 2)],
)
def test_a_kept_draft_saves_the_next_one(right, steps, kept):
    assert drafts.walk([one == "1" for one in right]) == (steps, kept)
