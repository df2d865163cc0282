"""Samples that think: the steps are between the marks, and lead to the answer."""

import sys
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="pip install -e '.[quickstart]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "thinking"))
import thinking


@pytest.mark.parametrize("family", thinking.STEPS)
def test_steps_stand_between_the_marks_and_lead_to_the_answer(family):
    for task, told in islice(thinking.samples(family, 1, set()), 300):
        question, answer = task.question, task.answer
        begin, rest = told.split(f"{thinking.BEGIN} ")
        steps, end = rest.split(f" {thinking.END} ")
        assert (begin, end, task.family) == ("", answer, family)
        parts = steps.split(" , ")
        if family == "word_sequence_reversal":
            assert ", ".join(part.split()[1] for part in reversed(parts)) == answer
        elif family == "number_filtering":
            assert str([part.split()[0] for part in parts if part.endswith("yes")]) == answer
        elif "+" in question:
            tens, ones = parts[-1].split(" 0 + ")
            assert 10 * int(tens) + int(ones) == int(answer)
        else:
            first, last = parts[0].split(" = ")[1], parts[1].removeprefix("- ")
            assert (int(first) - int(last)) * (-1 if "turned" in steps else 1) == int(answer)


def test_no_question_is_asked_twice():
    seen: set[str] = set()
    asked = [task.question for task, _ in islice(thinking.samples("chain_sum", 1, seen), 500)]
    assert len(set(asked)) == 500 and seen == set(asked)
