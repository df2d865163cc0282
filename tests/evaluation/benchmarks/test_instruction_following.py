"""IFEval and IFBench: the verdicts of the benchmarks' own scorers."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks import instruction_following
from zeda_megatron.evaluation.benchmarks.instruction_following import (
    check_questions,
    check_resources,
    followed,
    ifbench_questions,
    ifeval_questions,
    verify_ifbench,
    verify_ifeval,
)

nltk = pytest.importorskip("nltk")
pytest.importorskip("if_verifiable")

ROW = {
    "key": 1000,
    "prompt": "Write a riff without commas, in all lowercase. End with END.",
    "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
    "kwargs": [{}, {"end_phrase": "END", "num_words": None}],
}
AUTHORS = {**ROW, "uid": "ifeval-0", "prompt": [{"role": "user", "content": ROW["prompt"]}]}


def has_nltk_data() -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
        nltk.data.find("corpora/stopwords")
    except LookupError:
        return False
    return True


needs_data = pytest.mark.skipif(
    not has_nltk_data(), reason="NLTK's punkt_tab and stopwords are not installed"
)


@needs_data
@pytest.mark.parametrize("row", [ROW, AUTHORS], ids=["original", "authors"])
def test_all_instructions_must_be_followed(row):
    (question,) = ifeval_questions([row])
    assert question.messages == AUTHORS["prompt"]
    assert verify_ifeval(question, "la la END", "stop").right
    assert not verify_ifeval(question, "la, la END", "stop").right
    assert "startend:end_checker" in verify_ifeval(question, "la la", "stop").note
    assert not verify_ifeval(question, "", "stop").right
    assert verify_ifeval(question, "<think>a, b, c</think>la END", "stop").right
    assert not verify_ifeval(question, "<think>la END", "stop").right


@pytest.mark.parametrize("finish", ["length", None])
def test_an_answer_that_is_not_known_to_be_whole_follows_nothing(finish):
    """Thinking that the prompt opened and that was cut off looks like any text."""
    (question,) = ifeval_questions([ROW])
    assert verify_ifeval(question, "la la END", finish).note == "cut off"
    assert not verify_ifbench(question, "la la END", finish).right


def test_one_answer_has_one_verdict():
    row = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "en"}],
    }
    (question,) = ifeval_questions([row])
    state = random.getstate()
    assert len({verify_ifeval(question, "Hello world", "stop").right for _ in range(40)}) == 1
    assert random.getstate() == state


@needs_data
def test_loose_forgives_what_stands_around_an_answer():
    (question,) = ifeval_questions(
        [{**ROW, "instruction_id_list": ROW["instruction_id_list"][1:], "kwargs": ROW["kwargs"][1:]}]
    )
    strict, loose = followed("ifeval", question, "la END\nHope that helps!")
    assert (strict, loose) == ([False], [True])


@needs_data
def test_an_unknown_instruction_is_an_error_not_a_pass():
    (question,) = ifeval_questions([{**ROW, "instruction_id_list": ["made:up", "punctuation:no_comma"]}])
    with pytest.raises(UserError, match="no checker for made:up"):
        verify_ifeval(question, "la", "stop")


_REFERENCE = """
import json, sys
import nltk
nltk.download = lambda *a, **k: False
import ifbench.evaluation_lib as lib
from pathlib import Path
data = Path(lib.__file__).parent / "data"
answers = lib.read_prompt_to_response_dict(data / "sample_output.jsonl")
verdicts = {}
for example in lib.read_prompt_list(data / "IFBench_test.jsonl"):
    if "words:start_verb" in example.instruction_id_list and "--no-tagger" in sys.argv:
        continue
    strict = lib.test_instruction_following_strict(example, answers)
    loose = lib.test_instruction_following_loose(example, answers)
    verdicts[example.key] = [strict.follow_instruction_list, loose.follow_instruction_list]
print(json.dumps(verdicts))
"""


@needs_data
def test_verdicts_are_those_of_the_ifbench_package_on_its_sample_outputs(tmp_path):
    spec = find_spec("ifbench")
    if spec is None:
        pytest.skip(f"pip install --no-deps {instruction_following.IFBENCH_PACKAGE}")
    # The package imports spaCy for a model that it does not use.
    (tmp_path / "spacy").mkdir()
    (tmp_path / "spacy" / "__init__.py").touch()
    (tmp_path / "spacy" / "cli.py").write_text("def download(name):\n    pass\n")
    questions = ifbench_questions(instruction_following._package_rows())
    assert len(questions) == 294
    flags = []
    try:
        check_resources(questions)
    except UserError:
        flags = ["--no-tagger"]
        questions = [q for q in questions if "words:start_verb" not in q.reference["ids"]]
        check_resources(questions)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _REFERENCE, *flags], env=env, capture_output=True, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    samples = Path(spec.submodule_search_locations[0], "data", "sample_output.jsonl").read_text().splitlines()
    answers = {line["prompt"]: line["response"] for line in map(json.loads, samples)}
    right = 0
    for question in questions:
        answer = answers[question.reference["prompt"]]
        assert [*map(list, followed("ifbench", question, answer))] == theirs[question.uid], question.uid
        right += verify_ifbench(question, answer, "stop").right
    assert len(questions) == len(theirs) >= 288
    assert right == sum(all(loose) for _, loose in theirs.values()) > 50


def test_missing_nltk_data_is_named(monkeypatch):
    def nothing(path):
        raise LookupError(path)

    monkeypatch.setattr(nltk.data, "find", nothing)
    with pytest.raises(UserError, match=r"nltk\.downloader punkt_tab stopwords`"):
        check_resources(ifeval_questions([ROW]))
    row = {**ROW, "instruction_id_list": ["words:start_verb"], "kwargs": [{}]}
    with pytest.raises(UserError, match="averaged_perceptron_tagger_eng"):
        check_resources(ifbench_questions([row]))


def test_a_row_with_too_few_arguments_is_named():
    with pytest.raises(UserError, match="ifeval row 1: 2 instructions but 1 kwargs"):
        ifeval_questions([{**ROW, "kwargs": [{}]}])


@pytest.mark.parametrize(
    ("ids", "kwargs", "said"),
    [
        (["no:such"], [{}], "has no checker for no:such"),
        (["punctuation:no_comma"], [{"a": 1}], "punctuation:no_comma refuses its kwargs"),
        (
            ["length_constraints:number_words"],
            [{"num_words": "x", "relation": "at least"}],
            "refuses its kwargs",
        ),
        (["length_constraints:number_words"], [{"num_words": 5, "relation": "near"}], "refuses its kwargs"),
        (["keywords:existence"], [{"keywords": 5}], "refuses its kwargs"),
    ],
)
def test_instructions_that_no_checker_takes_are_named_before_anything_is_asked(
    ids, kwargs, said, monkeypatch
):
    monkeypatch.setattr(instruction_following, "check_resources", lambda questions: None)
    row = {**ROW, "instruction_id_list": ids, "kwargs": kwargs}
    with pytest.raises(UserError, match=f"ifeval 1000: .*{said}"):
        check_questions("ifeval", ifeval_questions([row]))
    check_questions("ifeval", ifeval_questions([ROW]))
