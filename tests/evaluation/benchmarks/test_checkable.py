"""reasoning-gym families and files with one right answer."""

import json

import pytest
import reasoning_gym

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks.checkable import (
    evaluates_answers,
    gym_benchmark,
    read_settings,
    task_questions,
    verify_task,
)


def test_a_family_is_asked_and_judged_as_the_package_does():
    settings = {"chain_sum": {"min_terms": 2, "max_terms": 2}}
    benchmark = gym_benchmark("reasoning_gym:chain_sum", settings)
    questions = benchmark.generate(5, 7)
    theirs = list(reasoning_gym.create_dataset("chain_sum", size=5, seed=7, min_terms=2, max_terms=2))
    assert [q.messages[0]["content"] for q in questions] == [entry["question"].strip() for entry in theirs]
    for question, entry in zip(questions, theirs):
        assert benchmark.verify(question, entry["answer"]).right
        assert benchmark.verify(question, f"<think>hm</think> I say <answer>{entry['answer']}</answer>").right
        assert not benchmark.verify(question, entry["answer"] + "1").right
        assert not benchmark.verify(question, "").right
    assert [q.uid for q in benchmark.generate(5, 8)] != [q.uid for q in questions]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("reasoning_gym", None, "name a family"),
        ("reasoning_gym:no_such", None, "reasoning_gym:no_such"),
        ("reasoning_gym:chain_sum", {"chain_sum": {"colour": 1}}, "reasoning_gym:chain_sum"),
    ],
)
def test_a_wrong_family_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        gym_benchmark(name, settings).generate(1, 0)


def test_tasks_of_a_rollout_file_have_one_right_answer():
    messages = [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": "1 2"}]
    rows = [{"messages": messages, "label": "1 2", "kind": "sort"}, {"messages": messages, "kind": "prose"}]
    (question,) = task_questions(rows)
    assert question.messages == messages[:1] and question.kind == "sort"
    assert verify_task(question, " 1 2\n").right and not verify_task(question, "1 2 3").right


def test_settings_of_families_come_from_a_file(tmp_path):
    file = tmp_path / "families.json"
    file.write_text(json.dumps({"chain_sum": {"min_terms": 2}}))
    assert read_settings(str(file)) == {"chain_sum": {"min_terms": 2}}
    file.write_text("[1]")
    with pytest.raises(UserError, match="--family-settings"):
        read_settings(str(file))


def test_answers_that_a_family_would_evaluate_are_judged_in_the_sandbox(tmp_path):
    benchmark = gym_benchmark("reasoning_gym:string_insertion")
    assert benchmark.runs_code and not gym_benchmark("reasoning_gym:chain_sum").runs_code
    (question,) = benchmark.generate(1, 3)
    entry = reasoning_gym.create_dataset("string_insertion", size=1, seed=3)[0]
    assert benchmark.verify(question, entry["answer"]).right
    target = tmp_path / "harmed"
    tmp_path.chmod(0o777)
    harmful = f"['a', open({str(target)!r}, 'w').name]"
    verdict = benchmark.verify(question, harmful)
    assert not verdict.right and not target.exists()


@pytest.mark.parametrize(
    "family", ["countdown", "puzzle24", "simple_integration", "n_queens", "spiral_matrix"]
)
def test_families_that_evaluate_are_known(family):
    assert evaluates_answers(family)
