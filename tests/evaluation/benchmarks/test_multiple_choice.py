"""GPQA and MMLU-Redux: choices in a fixed order, and letters however they are written."""

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks.multiple_choice import (
    MULTIPLE_CHOICE,
    gpqa_questions,
    letter_of,
    redux_questions,
    verify,
)

GPQA = {
    "Record ID": "rec1",
    "Question": "Which?",
    "Correct Answer": "yes",
    "Incorrect Answer 1": "no",
    "Incorrect Answer 2": "maybe",
    "Incorrect Answer 3": "never",
}
REDUX = {"question": "Which?", "choices": ["no", "yes", "maybe", "never"], "answer": 1, "error_type": "ok"}


def authors(label):
    return {"uid": "u1", "prompt": [{"role": "user", "content": "Which?"}], "label": label}


def test_gpqa_choices_are_shuffled_the_same_way_each_time():
    rows = [{**GPQA, "Record ID": str(i), "Question": f"Which {i}?"} for i in range(40)]
    first, again = gpqa_questions(rows), gpqa_questions(rows)
    assert [q.messages for q in first] == [q.messages for q in again]
    letters = [q.reference["label"] for q in first]
    assert set(letters) == set("ABCD")
    for question in first:
        assert f"{question.reference['label']}) yes" in question.messages[0]["content"]


def test_redux_leaves_out_what_its_reviewers_found_wrong():
    rows = [REDUX, {**REDUX, "error_type": "wrong_groundtruth"}]
    (question,) = redux_questions(rows)
    assert question.reference["label"] == "B"
    assert "B) yes" in question.messages[0]["content"]


def test_a_choice_that_is_not_there_is_named():
    with pytest.raises(UserError, match="row 1: answer 4 is none of the 4 choices"):
        redux_questions([{**REDUX, "answer": 4}])


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("B", "\\boxed{B}", True),
        ("B", "\\boxed{\\text{B}}", True),
        ("B", "\\boxed{(B)}", True),
        ("B", "\\boxed{B) yes}", True),
        ("B", "\\boxed{b}", True),
        ("B", "\\boxed{A}", False),
        ("B", "\\boxed{Banana}", False),
        ("B", "The answer is B", False),
        ("yes, it is", "\\boxed{\\text{Yes,  it is}}", True),
        ("\\boxed{C}", "\\boxed{C}", True),
        ("B", "<think>\\boxed{B} or", False),
        ("B", "<think>hm</think>\\boxed{B}", True),
    ],
)
def test_letters_are_read_however_they_are_boxed(label, answer, right):
    (question,) = gpqa_questions([authors(label)])
    assert verify(question, answer).right is right


BOXES = {
    "B": (
        "B",
        " b ",
        "(B)",
        "[B]",
        "B.",
        "B)",
        "B:",
        "(B).",
        "B) yes",
        "(B) yes, and no",
        "B. 42",
        "B: A decrease in pressure",
        "B. C",
        "B - yes",
        "\\textrm{B}",
        "{\\bf B}",
        "\\mathbf{(B)}",
        "\\mbox{B}",
        "\\text{ B }",
        "\\text{Option B}",
        "\\text{(B)}\\ yes",
        "Answer: B",
        "The answer is B",
        "the correct answer is (B) yes",
        "Answer: option B",
        "choice B.",
        "**B**",
        "$B$",
    ),
    "A": ("A) A decrease in pressure", "A. I", "(A) And so on"),
    "I": ("I",),
    None: (
        "A decrease in pressure",
        "A and C",
        "A, C",
        "A or B",
        "(A) and (C)",
        "A) B)",
        "A. and B.",
        "A) or C",
        "A/B",
        "A & B",
        "I think it is B",
        "AB",
        "Banana",
        "B12",
        "B-cell",
        "not B",
        "\\frac{A}{B}",
        "\\neg B",
        "",
        "42",
        "K",
    ),
}


@pytest.mark.parametrize(
    ("letter", "box"), [(letter, box) for letter, boxes in BOXES.items() for box in boxes]
)
def test_a_box_chooses_one_letter_or_none(letter, box):
    assert letter_of(box) == letter


def test_settings_are_the_papers():
    assert [(b.name, b.samples, b.max_new_tokens) for b in MULTIPLE_CHOICE] == [
        ("gpqa-diamond", 8, 32_768),
        ("mmlu-redux-2.0", 1, 32_768),
    ]
