"""Lines and files as they come: read for what they are, or refused in one line that names file and line."""

import bz2
import gzip
import json
import lzma
import os
import zipfile

import datasets
import pytest

from zeda_megatron.data.prompts import load_prompts, load_rollouts
from zeda_megatron.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
ASKED = [{"role": "user", "content": "hi"}]
PLAIN = json.dumps(GOOD).encode() + b"\n"


def rollout(content="yo", role="assistant", **more):
    return {"messages": [*ASKED, {"role": role, "content": content}], **more}


def sharegpt(*turns, **more):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], **more}


def said(*turns):
    return [{"role": role, "content": text} for role, text in turns]


ROLLOUTS_READ = {
    "sharegpt": (sharegpt(("human", "a"), ("gpt", "b")), said(("user", "a"), ("assistant", "b"))),
    "sharegpt of other names": (
        sharegpt(("system", "s"), ("user", "a"), ("chatgpt", "b"), ("observation", "o"), ("model", "c")),
        said(("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "o"), ("assistant", "c")),
    ),
    "sharegpt with a system text": (
        sharegpt(("human", "a"), ("gpt", "b"), system="s", id="7"),
        said(("system", "s"), ("user", "a"), ("assistant", "b")),
    ),
    "sharegpt with an empty system text": (
        sharegpt(("human", "a"), ("gpt", "b"), system="", tools=""),
        said(("user", "a"), ("assistant", "b")),
    ),
    "sharegpt with fields that say nothing": (
        {"conversations": [{"from": "human", "value": "a", "text": None}, {"from": "gpt", "value": "b"}]},
        said(("user", "a"), ("assistant", "b")),
    ),
    "conversations by role": ({"conversations": GOOD["messages"]}, GOOD["messages"]),
    "messages null beside conversations": (
        sharegpt(("human", "a"), ("gpt", "b"), messages=None),
        said(("user", "a"), ("assistant", "b")),
    ),
    "reasoning": (
        {"messages": [*ASKED, {"role": "assistant", "content": "", "reasoning_content": "hm"}]},
        [*ASKED, {"role": "assistant", "content": "", "reasoning_content": "hm"}],
    ),
    "an empty answer with ids": (rollout("", prompt_ids=[1], response_ids=[2]), rollout("")["messages"]),
    "tools that ids make harmless": (rollout(tools=[{}], prompt_ids=[1], response_ids=[2]), GOOD["messages"]),
    "largest id": (rollout(prompt_ids=[2**31 - 1], response_ids=[0]), GOOD["messages"]),
    "a label that is no number": (rollout(label=float("nan")), GOOD["messages"]),
    "an unknown field that is no number": (rollout(reward=float("inf")), GOOD["messages"]),
    "a whole surrogate pair": (rollout("\U0001f600"), rollout("\U0001f600")["messages"]),
    "a line separator": (rollout("a\u2028b\x85c\x0cd"), rollout("a\u2028b\x85c\x0cd")["messages"]),
    "a role of its own": (
        {"messages": [{"role": "developer-2", "content": "x"}, *GOOD["messages"]]},
        [{"role": "developer-2", "content": "x"}, *GOOD["messages"]],
    ),
    "a long answer": (rollout("x" * 10_000_000), rollout("x" * 10_000_000)["messages"]),
    "a deep label": (rollout(label=json.loads("[" * 90 + "]" * 90)), GOOD["messages"]),
}
PROMPTS_READ = {
    "openai": ({"messages": ASKED}, ASKED),
    "openai with history": ({"messages": [*GOOD["messages"], *ASKED]}, [*GOOD["messages"], *ASKED]),
    "openai, last a tool": (
        {"messages": [*ASKED, {"role": "tool", "content": "4"}]},
        [*ASKED, {"role": "tool", "content": "4"}],
    ),
    "openai beside a null prompt": ({"prompt": None, "messages": ASKED}, ASKED),
    "sharegpt": (sharegpt(("human", "a")), said(("user", "a"))),
    "text": ({"prompt": " a "}, said(("user", " a "))),
    "messages in prompt": ({"prompt": ASKED, "tools": []}, ASKED),
}
ROLLOUTS_REFUSED = {
    "half a pair in the content": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "half a character",
    ),
    "half a pair in the label": (PLAIN[:-2] + b', "label": {"a": ["\\udc00"]}}', "half a character"),
    "half a pair in the kind": (PLAIN[:-2] + b', "kind": "\\udfff"}', "half a character"),
    "half a pair in a key": (PLAIN[:-2] + b', "\\ud800": 1}', "half a character"),
    "5000 digits": (PLAIN[:-2] + b', "label": ' + b"7" * 5000 + b"}", "5000 digits"),
    "nesting": (PLAIN[:-2] + b', "label": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nested objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
    "a label nested a little less": (
        PLAIN[:-2] + b', "label": ' + b"[" * 200 + b"]" * 200 + b"}",
        '"label" is nested',
    ),
    "a key twice": (PLAIN[:-2] + b', "kind": "a", "kind": "b"}', "'kind' comes twice"),
    "an id of 2**31": (rollout(prompt_ids=[1], response_ids=[2**31]), "integers from 0 to 2**31 - 1"),
    "a huge id": (rollout(prompt_ids=[10**12], response_ids=[1]), "integers from 0 to 2**31 - 1"),
    "a negative id": (rollout(prompt_ids=[-1], response_ids=[1]), "integers from 0"),
    "an id that is text": (rollout(prompt_ids=["1"], response_ids=[1]), "integers from 0"),
    "ids that are no list": (rollout(prompt_ids=5, response_ids=[1]), "integers from 0"),
    "ids alone": (rollout(response_ids=[1]), "must come together"),
    "a role with markers": (rollout(role="<|im_start|>assistant"), "is no role"),
    "an empty role": (rollout(role=""), "is no role"),
    "a role of two words": (rollout(role="the assistant"), "is no role"),
    "a role with a line break": (rollout(role="user\n"), "is no role"),
    "a long role": (rollout(role="x" * 790_000), "is no role"),
    "an empty answer": (rollout(""), 'message 2 of "messages" is an answer without text'),
    "a blank answer": (rollout(" \n"), "an answer without text"),
    "an empty first answer": (
        {"messages": [*rollout("")["messages"], *GOOD["messages"]]},
        'message 2 of "messages" is an answer without text',
    ),
    "no answer": ({"messages": ASKED}, "no assistant message"),
    "content in parts": (rollout([{"type": "text", "text": "a"}]), 'needs a text "content"'),
    "no content": (rollout(None), 'needs a text "content"'),
    "tool calls": (
        {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
        'the key "tool_calls"',
    ),
    "a name": ({"messages": [{"role": "user", "content": "a", "name": "Al"}]}, 'the key "name"'),
    "a long key": ({"messages": [{"role": "user", "content": "a", "k" * 790_000: 1}]}, 'the key "kkk'),
    "thinking that is no text": (
        {"messages": [*ASKED, {"role": "assistant", "content": "a", "reasoning_content": []}]},
        '"reasoning_content" must be text',
    ),
    "tools": (rollout(tools=[{"name": "f"}]), 'has "tools"'),
    "functions": (rollout(functions=[{"name": "f"}]), 'has "functions"'),
    "sharegpt of nobody": (sharegpt(("human", "a"), ("function_call", "b")), 'is from "function_call"'),
    "sharegpt without value": ({"conversations": [{"from": "human"}]}, 'needs a text "value"'),
    "sharegpt with weights": (
        {"conversations": [{"from": "gpt", "value": "a", "weight": 0}]},
        'has the key "weight"; only from, value are read',
    ),
    "sharegpt without answer": (sharegpt(("human", "a")), "no assistant message"),
    "a system that is no text": (sharegpt(("human", "a"), ("gpt", "b"), system=[1]), '"system" must be text'),
    "messages that are text": ({"messages": "a"}, "non-empty list"),
    "messages that are none": ({"messages": []}, "non-empty list"),
    "a message that is text": ({"messages": ["a"]}, 'an object with "role" and "content"'),
    "other keys": ({"x" * 790_000: 1}, 'no key "messages"'),
    "instructions": ({"instruction": "a", "output": "b"}, 'no key "messages" (found instruction, output)'),
    "a finish that is no text": (rollout(finish_reason=1), '"finish_reason" must be text'),
    "a kind that is no text": (rollout(kind=["a"]), '"kind" must be text'),
    "a list": (b"[" + PLAIN.strip() + b"]", "expected a JSON object, found list"),
    "a number": (b"1", "expected a JSON object, found int"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "two on a line": (PLAIN.strip() * 2, "not valid JSON"),
    "a torn line": (PLAIN[:40], "not valid JSON"),
    "null bytes": (b"\x00" * 40, "not valid JSON"),
    "a control character": (PLAIN.replace(b"yo", b"y\x01o"), "not valid JSON"),
    "latin": (PLAIN.replace(b"yo", b"\xe9"), "not UTF-8"),
    "a second byte order mark": (b"\xef\xbb\xbf" + PLAIN, "not valid JSON"),
    "nothing but a comma": (b",", "not valid JSON"),
}
PROMPTS_REFUSED = {
    "empty": ({"prompt": ""}, "the prompt is empty"),
    "blank": ({"prompt": " \n\t"}, "the prompt is empty"),
    "an empty last message": ({"prompt": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    "openai, empty": ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty"),
    "answered": ({"prompt": GOOD["messages"]}, '"prompt" ends with an assistant message'),
    "openai, answered": (GOOD, '"messages" ends with an assistant message'),
    "sharegpt, answered": (sharegpt(("human", "a"), ("gpt", "b")), '"conversations" ends with an assistant'),
    "tools": ({"messages": ASKED, "tools": [{"name": "f"}]}, 'has "tools"'),
    "a number": ({"prompt": 3}, "non-empty list"),
    "nothing": ({"label": 1}, 'no key "prompt" (found label)'),
    "half a pair": (b'{"prompt": "\\ud83d"}', "half a character"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def as_bytes(line):
    return line if isinstance(line, bytes) else json.dumps(line).encode()


@pytest.mark.parametrize(
    ("load", "cases"),
    [(load_rollouts, ROLLOUTS_READ), (load_prompts, PROMPTS_READ)],
    ids=["rollouts", "prompts"],
)
def test_conversations_in_all_forms_are_read_as_the_same_messages(tmp_path, cache, load, cases):
    file = tmp_path / "all.jsonl"
    file.write_bytes(b"\n".join(as_bytes(line) for line, _ in cases.values()))
    for (name, (_, messages)), record in zip(cases.items(), load(file, cache_dir=cache), strict=True):
        assert record.messages == messages, name


@pytest.mark.parametrize(
    ("load", "first", "cases"),
    [
        (load_rollouts, PLAIN, ROLLOUTS_REFUSED),
        (load_prompts, b'{"prompt": "fine"}\n', PROMPTS_REFUSED),
    ],
    ids=["rollouts", "prompts"],
)
def test_every_other_line_is_refused_by_file_and_line_in_a_screens_width(tmp_path, cache, load, first, cases):
    for name, (line, reason) in cases.items():
        file = tmp_path / "bad.jsonl"
        file.write_bytes(first + b"\r\n" + as_bytes(line) + b"\n")
        with pytest.raises(UserError) as told:
            load(file, cache_dir=cache)
        message = str(told.value)
        assert message.startswith(f"{file} line 3: ") and reason in message, (name, message[:300])
        assert len(message) < len(str(file)) + 250 and message.isprintable(), name


def test_gzipped_files_and_byte_order_marks_are_read(tmp_path, cache):
    bom = b"\xef\xbb\xbf"
    contents = {
        "plain": PLAIN,
        "mark": bom + PLAIN,
        "windows": bom + PLAIN.replace(b"\n", b"\r\n"),
        "blank lines": b"\n \t\r\n" + PLAIN + b"\n\n",
        "no last newline": PLAIN.strip(),
        "gzip.jsonl.gz": gzip.compress(PLAIN),
        "gzip of another name": gzip.compress(bom + PLAIN),
        "gzip in two parts": gzip.compress(PLAIN) + gzip.compress(b"\n"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    assert [r.messages for r in load_rollouts(files, cache_dir=cache)] == [GOOD["messages"]] * len(files)


def test_what_is_no_file_of_lines_is_refused_by_name_and_kind(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    packed = gzip.compress(PLAIN * 500)
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a.jsonl", PLAIN)
    for name, content in {
        "empty": b"",
        "blank": b"\n \n",
        "only a mark": b"\xef\xbb\xbf",
        "empty gzip": gzip.compress(b""),
        "torn gzip": packed[:-20],
        "damaged gzip": packed[:30] + b"\xff" * 20 + packed[50:],
        "xz": lzma.compress(PLAIN),
        "bzip2": bz2.compress(PLAIN),
        "utf-16": PLAIN.decode().encode("utf-16"),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(20),
        "parquet": b"PAR1" + bytes(20),
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, reason in {
        "pipe": "is a pipe",
        "folder": "is a folder",
        "link": "no such file",
        "nothing": "no such file",
        "empty/below": "cannot be read",
        "/dev/zero": "is a device",
        "/dev/null": "is a device",
        "a\0b": "no name of a file",
        "empty": "the file is empty",
        "blank": "no lines with content",
        "only a mark": "no lines with content",
        "empty gzip": "no lines with content",
        "torn gzip": "damaged or cut off",
        "damaged gzip": "damaged or cut off",
        "xz": "is an xz file",
        "bzip2": "is a bzip2 file",
        "zip": "is a zip file",
        "utf-16": "is UTF-16",
        "zstd": "is a zstd file",
        "parquet": "is a parquet file",
    }.items():
        with pytest.raises(UserError) as told:
            load_rollouts([tmp_path / name], cache_dir=cache)
        assert reason in str(told.value) and str(told.value).isprintable(), (name, str(told.value))
        assert str(tmp_path / name).split("\0")[0] in str(told.value)


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    (tmp_path / "file").touch()
    wrong = tmp_path / "file" / "cache"
    with pytest.raises(UserError, match=f"{wrong}: .*HF_DATASETS_CACHE"):
        load_rollouts(tmp_path / "a.jsonl", cache_dir=wrong)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(wrong))
    with pytest.raises(UserError, match=f"{wrong}: .*HF_DATASETS_CACHE"):
        load_rollouts(tmp_path / "a.jsonl")
