"""Prompt and rollout files: formats, and errors that name the line."""

import json

import datasets
import pytest

from zeda_megatron.data.prompts import load_prompts, load_rollouts
from zeda_megatron.data.records import Prompt, Rollout
from zeda_megatron.errors import UserError

USER = {"role": "user", "content": "1 + 1 ="}
ANSWER = {"role": "assistant", "content": "2"}


@pytest.fixture
def write(tmp_path):
    def _write(*lines, name="data.jsonl"):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return _write


def test_the_authors_prompts_are_read_unchanged(write, tmp_path):
    file = write({"prompt": [USER], "label": "2"}, {"prompt": "Why?", "label": None})
    prompts = load_prompts(file, cache_dir=tmp_path / "cache")
    assert list(prompts) == [Prompt([USER], "2"), Prompt([{"role": "user", "content": "Why?"}])]
    assert isinstance(prompts.dataset, datasets.Dataset)


def test_the_authors_rollouts_are_read_unchanged(write, tmp_path):
    rollouts = load_rollouts(write({"messages": [USER, ANSWER]}), cache_dir=tmp_path / "cache")
    assert len(rollouts) == 1
    assert rollouts[0] == Rollout([USER, ANSWER])


def test_labels_of_different_types_survive_in_one_file(write, tmp_path):
    labels = ["2", 3, 2.5, None, True, {"answer": [1, "ü"]}, ["a", 1]]
    file = write(*[{"prompt": "q", "label": label} for label in labels])
    assert [p.label for p in load_prompts(file, cache_dir=tmp_path / "cache")] == labels


def test_token_ids_and_finish_reason_survive_a_written_rollout(write, tmp_path):
    rollout = Rollout([USER, ANSWER], "2", "chain_sum", [5, 6], [7, 2], "stop")
    bare = Rollout([{"role": "user", "content": "q", "reasoning_content": "r"}, ANSWER])
    file = write(rollout.to_line(), bare.to_line())
    assert "prompt_ids" not in bare.to_line()
    assert list(load_rollouts(file, cache_dir=tmp_path / "cache")) == [rollout, bare]


def test_several_files_are_read_in_order_and_by_slice(write, tmp_path):
    files = [write({"prompt": str(i)}, {"prompt": str(i + 1)}, name=f"{i}.jsonl") for i in (0, 2)]
    prompts = load_prompts(files, cache_dir=tmp_path / "cache")
    assert [p.messages[0]["content"] for p in prompts[1:]] == ["1", "2", "3"]


def test_a_changed_file_is_not_taken_from_the_cache(write, tmp_path):
    cache = tmp_path / "cache"
    assert load_prompts(write({"prompt": "old"}), cache_dir=cache)[0].messages[0]["content"] == "old"
    assert load_prompts(write({"prompt": "newer"}), cache_dir=cache)[0].messages[0]["content"] == "newer"


def test_empty_lines_do_not_shift_the_line_number(write, tmp_path):
    file = write({"prompt": "q"}, "", {"label": 1})
    with pytest.raises(UserError, match=r"data.jsonl line 3: no key \"prompt\" \(found label\)"):
        load_prompts(file, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "cut', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ({"prompt": []}, "non-empty list"),
        ({"prompt": 3}, "non-empty list"),
        ({"prompt": [{"role": "user"}]}, 'message 1 of "prompt" needs a text "content"'),
        ({"prompt": ["hi"]}, 'must be an object with "role" and "content"'),
        ({"prompt": [USER, ANSWER]}, "ends with an assistant message"),
        ({"prompt": [USER | {"tool_calls": []}]}, 'the key "tool_calls"'),
        ({"prompt": "q", "kind": 3}, '"kind" must be text'),
    ],
)
def test_a_bad_prompt_line_is_named(write, tmp_path, line, message):
    with pytest.raises(UserError) as error:
        load_prompts(write({"prompt": "fine"}, line), cache_dir=tmp_path / "cache")
    assert "data.jsonl line 2: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "q"}, 'no key "messages"'),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, ANSWER], "prompt_ids": [1]}, "must come together"),
        (
            {"messages": [USER], "prompt_ids": [1], "response_ids": [1.5]},
            '"response_ids" must be a list of token',
        ),
        (
            {"messages": [USER], "prompt_ids": [True], "response_ids": [1]},
            '"prompt_ids" must be a list of token',
        ),
    ],
)
def test_a_bad_rollout_line_is_named(write, tmp_path, line, message):
    with pytest.raises(UserError) as error:
        load_rollouts(write({"messages": [USER, ANSWER]}, line), cache_dir=tmp_path / "cache")
    assert "data.jsonl line 2: " in str(error.value)
    assert message in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl", cache_dir=tmp_path / "cache")


def test_missing_and_empty_files_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file"):
        load_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="is empty"):
        load_prompts(write())
    with pytest.raises(UserError, match="no lines with content"):
        load_prompts(write("", " "), cache_dir=tmp_path / "cache")


def test_an_error_leaves_nothing_else_on_stderr(write, tmp_path, capfd):
    with pytest.raises(UserError):
        load_prompts(write({"prompt": "fine"}, "{"), cache_dir=tmp_path / "cache")
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
