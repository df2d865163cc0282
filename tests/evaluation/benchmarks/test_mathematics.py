"""Mathematics: the authors' and the original rows give the same questions; math-verify decides."""

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks import mathematics
from zeda_megatron.evaluation.benchmarks.benchmark import Question, after_thinking, last_box, last_code_block
from zeda_megatron.evaluation.benchmarks.mathematics import questions, verify

AUTHORS = {"uid": "aime-2024-0", "prompt": [{"role": "user", "content": "What? Box it."}], "label": "204"}
ORIGINAL = {
    "HuggingFaceH4/aime_2024": {
        "id": 60,
        "problem": "What?",
        "solution": "...",
        "answer": "204",
        "year": "2024",
    },
    "Maxwell-Jia/AIME_2024": {"ID": "2024-I-1", "Problem": "What?", "Solution": "...", "Answer": 204},
    "math-ai/aime25": {"problem": "What?", "answer": "204", "id": "0"},
    "MathArena/aime_2026": {"problem_idx": 1, "answer": 204, "problem": "What?"},
    "openai/gsm8k": {"question": "What?", "answer": "She sells 4 * 51 = <<4*51=204>>204.\n#### 204"},
    "HuggingFaceH4/MATH-500": {
        "problem": "What?",
        "solution": "\\boxed{204}",
        "answer": "204",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
}


def asks(label: str) -> Question:
    return questions([{**AUTHORS, "label": label}])[0]


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_rows_are_read(name):
    (question,) = questions([ORIGINAL[name]])
    assert question.reference == {"label": "204"}
    assert (
        question.messages[-1]["content"].startswith("What?")
        and "\\boxed{}" in question.messages[-1]["content"]
    )


def test_a_question_numbered_0_keeps_its_name():
    rows = [{"problem": f"What {i}?", "answer": "1", "id": i} for i in range(3)]
    assert [question.uid for question in questions(rows)] == ["0", "1", "2"]


def test_the_authors_prompt_stays_as_it_is():
    (question,) = questions([AUTHORS])
    assert question.messages == AUTHORS["prompt"] and question.uid == "aime-2024-0"


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("204", "So it is \\boxed{204}.", True),
        ("204", "First \\boxed{3}, no: \\boxed{204}.", True),
        ("204", "\\boxed{204} and then \\boxed{3}", False),
        ("204", "The answer is 204.", False),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("\\frac{1}{2}", "\\boxed{\\dfrac{2}{4}}", True),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", False),
        ("x^2+2x+1", "\\boxed{(x+1)^2}", True),
        ("(1,2)", "\\boxed{(2,1)}", False),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
        ("1000", "\\boxed{1{,}000}", True),
        ("\\boxed{204}", "\\boxed{204}", True),
        ("10\\%", "\\boxed{10\\%}", True),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
        ("\\text{Evelyn}", "\\boxed{\\text{Carla}}", False),
        ("073", "\\boxed{73}", True),
        ("204", "\\boxed{", False),
        ("204", "\\boxed{\\frac{1}{0}}", False),
    ],
)
def test_equal_answers_are_right_whatever_their_form(label, answer, right):
    assert verify(asks(label), answer).right is right


def test_an_answer_is_never_evaluated(tmp_path):
    target = tmp_path / "harmed"
    for code in (
        f"open('{target}','w')",
        f"__import__('os').system('touch {target}')",
        f"exec(\"open('{target}','w')\")",
    ):
        for answer in (f"\\boxed{{{code}}}", f"\\boxed{{1+{code}}}", f"\\boxed{{${code}$}}"):
            assert not verify(asks("204"), answer).right
    assert not target.exists()


def test_a_row_without_an_answer_is_named():
    with pytest.raises(UserError, match="row 2: no key answer or Answer"):
        questions([ORIGINAL["math-ai/aime25"], {"problem": "What?"}])


def test_settings_are_the_papers():
    samples = {one.name: one.samples for one in mathematics.MATHEMATICS}
    assert samples == {"aime-2024": 32, "aime-2025": 32, "aime-2026": 32, "gsm8k": 1, "math-500": 1}
    assert {one.max_new_tokens for one in mathematics.MATHEMATICS} == {38_912}


def test_parts_of_an_answer():
    assert last_box("\\boxed{a{b}c} \\boxed{open") == "a{b}c"
    assert last_box("none") is None
    assert after_thinking("<think>no</think> yes ") == "yes"
    assert after_thinking("<think>never ends") == ""
    assert after_thinking("plain") == "plain"
    assert last_code_block("```\na\n```\ntext\n```python\n  b\n```") == "  b"
    assert last_code_block("```python\nnever closed") is None
