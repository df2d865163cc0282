"""LiveCodeBench's packed tests: read, and never unpickled."""

import base64
import json
import os
import pickle
import zlib

import pytest

from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.benchmarks import private_tests
from zeda_megatron.evaluation.benchmarks.private_tests import decode_tests

TESTS = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "é", "output": "", "testtype": "stdin"},
]


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch /tmp/zeda-harmed",))

    def __repr__(self):
        return "Harmful()"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_the_data_set_packs_is_read(protocol):
    assert decode_tests(packed(pickle.dumps(json.dumps(TESTS), protocol)), "row 1") == TESTS


def test_a_long_text_is_read():
    tests = [{"input": "x" * 70_000, "output": "y"}]
    assert decode_tests(packed(pickle.dumps(json.dumps(tests))), "row 1") == tests


def test_plain_forms_are_read():
    assert decode_tests(TESTS, "row 1") == TESTS
    assert decode_tests(json.dumps(TESTS), "row 1") == TESTS
    assert decode_tests(None, "row 1") == decode_tests("", "row 1") == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [Harmful(), ["a"], {"a": "b"}, 7, b"bytes", ("a", "b"), None], ids=repr)
def test_a_pickle_of_anything_else_is_refused_and_not_run(value, protocol):
    data = pickle.dumps(value, protocol)
    with pytest.raises(UserError, match="row 1: private tests"):
        decode_tests(packed(data), "row 1")
    assert not os.path.exists("/tmp/zeda-harmed")


def test_damaged_and_oversized_data_are_refused(monkeypatch):
    whole = packed(pickle.dumps(json.dumps(TESTS)))
    for damaged in (
        "%%%",
        base64.b64encode(b"no zlib").decode(),
        whole[: len(whole) // 2 // 4 * 4],
        packed(b"junk"),
    ):
        with pytest.raises(UserError, match="row 1: private tests"):
            decode_tests(damaged, "row 1")
    with pytest.raises(UserError, match="list of objects"):
        decode_tests(packed(pickle.dumps(json.dumps(["no test"]))), "row 1")
    monkeypatch.setattr(private_tests, "MOST", 1000)
    with pytest.raises(UserError, match="larger than"):
        decode_tests(packed(pickle.dumps(json.dumps([{"input": "x" * 5000, "output": ""}]))), "row 1")
