"""Stage 0: every question is answered once, whatever interrupts it."""

import hashlib
import json
import re

import pytest
import stage0_files
import tiny_world

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.data.prompts import load_rollouts
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.errors import UserError
from zeda_megatron.runtime import terminal
from zeda_megatron.training.stage0 import (
    RolloutFile,
    answer_questions,
    make_questions,
    run_stage0,
    sampling_settings,
)

pytestmark = pytest.mark.usefixtures("one_process")
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=1.0, seed=5)


class Counting:
    """An engine that notes what it is asked, and may die."""

    def __init__(self, engine, die_at=None):
        self.engine, self.asked, self.die_at, self.deal = engine, [], die_at, engine.deal

    def generate(self, prompts, sampling, stream_ids):
        if self.die_at is not None and len(self.asked) >= self.die_at:
            raise KeyboardInterrupt
        self.asked += list(zip(map(tuple, prompts), stream_ids))
        return self.engine.generate(prompts, sampling, stream_ids)


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world.hf)


@pytest.fixture(scope="module")
def engine(world, tokenizer):
    import tiny

    hf = tiny.hf_model(std=0.1, **tiny_world.MODEL)
    return BuiltinEngine(tiny.megatron_model(hf), tokenizer.eos_ids, tokenizer.pad_id, max_length=64)


def opened(path, sampling=SAMPLING, teacher="t"):
    file = RolloutFile(path, sampling_settings(sampling, teacher))
    file.open()
    return file


def answer(world, tokenizer, engine, path, batch_size=4, samples=2, sampling=SAMPLING, **kwargs):
    questions = make_questions([str(world.prompts)], tokenizer, 64, samples)
    return answer_questions(
        questions, engine, tokenizer, sampling, opened(path, sampling), batch_size, progress=False, **kwargs
    )


def by_key(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    return {line["key"]: line for line in lines}


@pytest.fixture(scope="module")
def whole(world, tokenizer, engine, tmp_path_factory):
    """All answers, without interruption."""
    path = tmp_path_factory.mktemp("stage0") / "a.jsonl"
    assert answer(world, tokenizer, engine, path) == 18
    return by_key(path)


def test_every_prompt_gets_its_answers_in_the_format_that_training_reads(world, whole, tmp_path, tokenizer):
    prompts = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in whole.values()))
    rollouts = list(load_rollouts(path))
    assert sorted(r.messages[0]["content"] for r in rollouts) == sorted(
        p["prompt"] for p in prompts for _ in range(2)
    )
    for rollout in rollouts:
        question, reply = rollout.messages
        assert (question["role"], reply["role"]) == ("user", "assistant")
        assert rollout.label == next(p["label"] for p in prompts if p["prompt"] == question["content"])
        assert rollout.prompt_ids == tokenizer.chat_ids([question], add_generation_prompt=True)
        assert reply["content"] == tokenizer.decode(rollout.response_ids)
        assert 1 <= len(rollout.response_ids) <= 6
        assert rollout.finish_reason == (
            "stop" if rollout.response_ids[-1] in tokenizer.eos_ids else "length"
        )


def test_two_answers_to_one_prompt_differ(whole):
    pairs = {}
    for key, line in whole.items():
        pairs.setdefault(key.rsplit("-", 1)[0], []).append(line["response_ids"])
    assert all(len(pair) == 2 for pair in pairs.values()) and any(a != b for a, b in pairs.values())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_do_not_depend_on_the_batch_size(world, tokenizer, engine, whole, tmp_path, batch_size):
    answer(world, tokenizer, engine, tmp_path / "b.jsonl", batch_size)
    assert by_key(tmp_path / "b.jsonl") == whole


def test_interrupted_and_restarted_nothing_is_answered_twice(world, tokenizer, engine, whole, tmp_path):
    path = tmp_path / "a.jsonl"
    dying = Counting(engine, die_at=8)
    with pytest.raises(KeyboardInterrupt):
        answer(world, tokenizer, dying, path)
    assert len(by_key(path)) == 8
    rest = Counting(engine)
    assert answer(world, tokenizer, rest, path) == 10
    assert not set(dying.asked) & set(rest.asked)
    assert by_key(path) == whole
    idle = Counting(engine)
    assert answer(world, tokenizer, idle, path) == 0 and idle.asked == []


def test_a_stop_request_ends_after_the_batch(world, tokenizer, engine, whole, tmp_path):
    path = tmp_path / "a.jsonl"
    assert answer(world, tokenizer, engine, path, should_stop=lambda: True) == 4
    assert answer(world, tokenizer, engine, path) == 14
    assert by_key(path) == whole


@pytest.mark.parametrize("torn", ['{"key": "abc', '{"key": "abc"}', "\x00\x00", "{"])
def test_a_torn_last_line_is_dropped(world, tokenizer, engine, whole, tmp_path, torn):
    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(world, tokenizer, Counting(engine, die_at=8), path)
    with open(path, "a") as file:
        file.write(torn)
    assert len(opened(path).answered) == 8
    answer(world, tokenizer, engine, path)
    assert by_key(path) == whole


def test_a_broken_line_in_the_middle_is_a_user_error(world, tokenizer, engine, tmp_path):
    path = tmp_path / "a.jsonl"
    answer(world, tokenizer, engine, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"messages": []}\n', *lines[2:]]))
    with pytest.raises(UserError, match=r"a\.jsonl line 2: not a line of stage 0"):
        opened(path)


@pytest.mark.parametrize(
    ("sampling", "teacher", "word"),
    [
        (SamplingConfig(7, seed=5), "t", "max_new_tokens = 6, now it is 7"),
        (SamplingConfig(6, temperature=0.5, seed=5), "t", "temperature = 1.0, now it is 0.5"),
        (SamplingConfig(6, seed=6), "t", "seed = 5, now it is 6"),
        (SAMPLING, "other", "teacher = 't', now it is 'other'"),
    ],
)
def test_answers_of_other_settings_are_not_mixed_in(
    world, tokenizer, engine, tmp_path, sampling, teacher, word
):
    path = tmp_path / "a.jsonl"
    answer(world, tokenizer, engine, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"a.jsonl was sampled with {word}: .*--rollout-path"):
        opened(path, sampling, teacher)
    assert path.read_bytes() == before


@pytest.mark.parametrize("meta", [None, "{", "[]"])
def test_a_file_without_its_settings_is_refused(world, tokenizer, engine, tmp_path, meta):
    path = tmp_path / "a.jsonl"
    answer(world, tokenizer, engine, path)
    settings = tmp_path / "a.jsonl.meta.json"
    settings.unlink()
    if meta:
        settings.write_text(meta)
    with pytest.raises(UserError, match=r"a\.jsonl\.meta\.json"):
        opened(path)


def test_a_prompt_as_long_as_the_context_is_a_user_error(world, tokenizer):
    lengths = [len(q.ids) for q in make_questions([str(world.prompts)], tokenizer, 64)]
    make_questions([str(world.prompts)], tokenizer, max(lengths) + 1)
    first = lengths.index(max(lengths)) + 1
    with pytest.raises(
        UserError, match=f"prompt {first} has {max(lengths)} tokens; the context of {max(lengths)} "
    ):
        make_questions([str(world.prompts)], tokenizer, max(lengths))


def test_all_prompts_as_long_as_the_context_are_named_or_left_out(world, tokenizer):
    questions = make_questions([str(world.prompts)], tokenizer, 64)
    lengths = [len(q.ids) for q in questions]
    limit = sorted(lengths)[4]
    long = [number for number, length in enumerate(lengths, 1) if length >= limit]
    with pytest.raises(UserError) as told:
        make_questions([str(world.prompts)], tokenizer, limit)
    message = str(told.value)
    assert f"prompt {long[0]} has {lengths[long[0] - 1]} tokens; the context of {limit} " in message
    assert all(f"{number} has {lengths[number - 1]} tokens" in message for number in long)
    assert f"(so do {len(long) - 1} more: " in message and "--overlong skip" in message
    lines = []
    kept = make_questions([str(world.prompts)], tokenizer, limit, overlong="skip", say=lines.append)
    assert kept == [q for q, length in zip(questions, lengths) if length < limit]
    assert lines == [
        f"{world.prompts}: {len(long)} of 9 prompts left out, as long as the context of {limit} or longer"
    ]
    with pytest.raises(UserError, match="no prompt is left"):
        make_questions([str(world.prompts)], tokenizer, 2, overlong="skip")


def test_very_many_and_very_long_prompts_are_named_in_a_few_words(tokenizer, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 5_000_000}) + "\n" + '{"prompt": "one two three"}\n' * 400)
    with pytest.raises(UserError, match=r"prompt 1 has far too many tokens; .*so do 400 more: 2 has") as told:
        make_questions([str(prompts)], tokenizer, 8)
    assert len(str(told.value)) < 1000


def test_prompts_of_all_forms_are_asked_alike(tokenizer, tmp_path):
    for name, line in {
        "prompt": {"prompt": "one two"},
        "openai": {"messages": [{"role": "user", "content": "one two"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "one two"}]},
    }.items():
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    made = [
        make_questions([str(tmp_path / name)], tokenizer, 64) for name in ("prompt", "openai", "sharegpt")
    ]
    assert made[0] == made[1] == made[2]


@pytest.fixture
def dated(world, tmp_path, monkeypatch):
    """A chat template that writes the day, and a way to move the clock of templates and of stage 0."""
    import datetime

    from transformers.utils import chat_template_utils

    from zeda_megatron.training import stage0

    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + tiny_world.CHATML)

    def _move(year):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 1, 2)

        class Day(datetime.date):
            @classmethod
            def today(cls):
                return cls(year, 1, 2)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(stage0.datetime, "date", Day)
        return template

    return _move


def test_after_midnight_nothing_is_answered_again_and_the_rest_knows_the_first_day(
    world, dated, tmp_path, capsys
):
    whole = stage0_options(world, tmp_path / "whole", chat_template_file=dated(2030))
    assert run_stage0(whole) == 0
    options = stage0_options(world, tmp_path / "a", chat_template_file=dated(2030))
    run_stage0(options)
    lines = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "a").write_text("".join(lines[:4]))
    dated(2031)
    assert run_stage0(options) == 0
    assert "5 answers now, 9 in all, 0 left" in capsys.readouterr().out
    assert by_key(tmp_path / "a") == by_key(tmp_path / "whole")
    assert json.loads((tmp_path / "a.meta.json").read_text())["day"] == "2030-01-02"
    (tmp_path / "a.meta.json").write_text('{"day": "soon"}')
    with pytest.raises(UserError, match=r'a.meta.json: "day" is not a date'):
        run_stage0(options)


def test_the_day_is_nothing_to_a_template_that_does_not_write_it(world, dated, tmp_path):
    dated(2030)
    options = stage0_options(world, tmp_path / "a")
    run_stage0(options)
    before = (tmp_path / "a").read_text()
    dated(2031)
    assert run_stage0(options) == 0
    assert (tmp_path / "a").read_text() == before and '"day"' not in (tmp_path / "a.meta.json").read_text()


def test_the_keys_of_questions_do_not_know_the_day(world, dated, tmp_path):
    tokenizer = load_tokenizer(world.hf, chat_template_file=dated(2030))
    before = make_questions([str(world.prompts)], tokenizer, 64)
    dated(2031)
    after = make_questions([str(world.prompts)], tokenizer, 64)
    assert [q.key for q in before] == [q.key for q in after]
    assert before[0].ids != after[0].ids


def test_a_dated_template_is_no_other_data_to_a_resumed_run(world, dated, tmp_path):
    for stage, data in (("1", world.rollouts), ("2", world.prompts)):
        fields = {
            "stage": stage,
            "data_path": data,
            "chat_template_file": dated(2030),
            "global_batch_size": 1,
        }
        feeds = []
        for year in (2030, 2031):
            dated(year)
            feeds.append(tiny_world.start(world, train_iters=1, **fields).feed)
        assert feeds[0].fingerprint() == feeds[1].fingerprint()
        if stage == "1":
            assert "2026-01-01" in load_tokenizer(world.hf).decode(
                feeds[1].next_rows(0).rows[0].tokens[0].tolist()
            )


@pytest.mark.parametrize("change", ["template", "tokenizer"])
def test_answers_to_other_prompts_are_not_mixed_in(world, tmp_path, change):
    run_stage0(stage0_options(world, tmp_path / "a"))
    (tmp_path / "t.jinja").write_text(tiny_world.CHATML + " ")
    other = {"chat_template_file": tmp_path / "t.jinja"}
    if change == "tokenizer":
        import shutil

        shutil.copytree(world.hf, tmp_path / "hf")
        made = (tmp_path / "hf" / "tokenizer.json").read_text()
        (tmp_path / "hf" / "tokenizer.json").write_text(
            made.replace('"add_prefix_space": false', '"add_prefix_space": true')
        )
        other = {"tokenizer_model": tmp_path / "hf"}
    with pytest.raises(UserError, match="a was sampled with prompts_by = '"):
        run_stage0(stage0_options(world, tmp_path / "a", **other))


def test_what_is_no_file_of_answers_is_refused_and_not_waited_for(world, tokenizer, tmp_path):
    import os

    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "b.meta.json")
    (tmp_path / "b").write_text('{"key": "x"}\n')
    (tmp_path / "c.meta.json").mkdir()
    for name, kind in (("folder", "a folder"), ("pipe", "a pipe"), ("b", "a pipe"), ("c", "a folder")):
        with pytest.raises(UserError, match=f"is {kind}, where a regular file belongs"):
            opened(tmp_path / name)
    for line in (
        "[" * 100_000,
        '{"key": ' + "[" * 100_000,
        '{"key": ' + "7" * 5000 + "}",
        '{"key": []}',
        "5",
        "\x00",
    ):
        path = tmp_path / "d"
        path.unlink(missing_ok=True)
        file = opened(path)
        path.write_text(line + "\n" + '{"key": "x"}\n')
        with pytest.raises(UserError, match=r"d line 1: not (a line of stage 0|valid JSON|UTF-8)"):
            file.open()
    for meta in ("[" * 100_000, '{"seed": ' + "7" * 5000 + "}", "\x00" * 50, '{"seed": 1, "seed": 5}'):
        (tmp_path / "d.meta.json").write_text(meta)
        with pytest.raises(UserError, match=r"d.meta.json: cannot be read as JSON"):
            opened(tmp_path / "d")


def test_thinking_markers_stand_in_the_text_of_an_answer(world, tmp_path):
    import transformers
    from tokenizers import AddedToken

    from zeda_megatron.distill.answers import Deal, Generation

    there = transformers.AutoTokenizer.from_pretrained(world.hf)
    there.add_tokens(
        [AddedToken("<think>", special=True), AddedToken("</think>", special=True)], special_tokens=True
    )
    there.save_pretrained(tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")

    class Thinking:
        deal = Deal.of_models()

        def generate(self, prompts, sampling, stream_ids):
            ids = tokenizer.encode("<think>maybe 41</think>42<|im_end|>")
            return [Generation(ids, [0.0] * len(ids), "stop") for _ in prompts]

    answer(world, tokenizer, Thinking(), tmp_path / "a.jsonl")
    texts = {line["messages"][-1]["content"] for line in by_key(tmp_path / "a.jsonl").values()}
    assert texts == {"<think>maybe 41</think>42"}


def test_equal_prompts_are_questions_of_their_own(world, tokenizer, engine, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "one two"}\n' * 3 + '{"prompt": "cat"}\n')
    questions = make_questions([str(prompts)], tokenizer, 64, samples_per_prompt=2)
    assert len({q.key for q in questions}) == 8
    made = opened(tmp_path / "a.jsonl")
    answer_questions(questions, engine, tokenizer, SAMPLING, made, 3, progress=False)
    assert len(by_key(tmp_path / "a.jsonl")) == 8


def stage0_options(world, path, **values):
    """Greedy, unless a test wants samples."""
    return stage0_files.stage0_options(world, path, **{"temperature": 0.0} | values)


def test_stage_0_asks_the_static_model_whichever_checkpoint_it_gets(world, tmp_path, capsys):
    for name in ("static", "dynamic"):
        options = stage0_options(world, tmp_path / name, pretrained_checkpoint=getattr(world, name))
        assert run_stage0(options) == 0
    assert by_key(tmp_path / "static") == by_key(tmp_path / "dynamic")
    assert f"{tmp_path / 'static'}: 9 answers now, 9 in all, 0 left" in capsys.readouterr().out


def test_what_is_left_counts_the_questions_of_this_run(world, tmp_path, capsys):
    run_stage0(stage0_options(world, tmp_path / "a"))
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(world.prompts.read_text().splitlines(keepends=True)[:3]))
    run_stage0(stage0_options(world, tmp_path / "a", data_path=fewer))
    assert "0 answers now, 9 in all, 0 left" in capsys.readouterr().out.splitlines()[-1]


def test_the_bar_moves_while_a_batch_is_answered_and_ends_at_what_is_on_disk(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0)
    run_stage0(stage0_options(world, tmp_path / "a", progress=True))  # all 9 prompts are one batch
    counts = [int(count) for count in re.findall(r"stage 0: .* (\d+)/9 ", capsys.readouterr().err)]
    assert counts == sorted(counts) and counts[-1] == 9 and len(set(counts)) > 3
    run_stage0(stage0_options(world, tmp_path / "b", progress=False))
    assert capsys.readouterr().err == ""


def test_a_finished_stage_0_given_again_says_so_without_a_look_at_the_weights(
    world, tmp_path, capsys, monkeypatch
):
    run_stage0(stage0_options(world, tmp_path / "a"))
    first = capsys.readouterr().out.splitlines()[-1]
    flags = f"--pretrained-checkpoint {world.static} --data-path {tmp_path / 'a'}"
    assert f"next: zeda fit {flags} --save DIR" in first and "nothing to do" not in first
    monkeypatch.setattr("zeda_megatron.training.stage0.build_chunks", None)
    assert run_stage0(stage0_options(world, tmp_path / "a")) == 0
    again = capsys.readouterr().out.splitlines()[-1]
    assert again.startswith(
        f"nothing to do: {tmp_path / 'a'}: 0 answers now, 9 in all, 0 left; next: zeda fit"
    )


def test_rows_of_the_embedding_that_the_tokenizer_lacks_are_never_sampled(world, tokenizer, engine):
    assert tokenizer.vocab_size == 259 < tiny_world.MODEL["vocab_size"]
    hot, ids = SamplingConfig(max_new_tokens=40, temperature=50.0), list(range(30))
    free = [t for g in engine.generate([[5]] * 30, hot, ids) for t in g.response_ids]
    assert max(free) >= 259
    careful = BuiltinEngine(engine.chunks, engine.stop_ids, engine.pad_id, 64, vocab_size=259)
    assert max(t for g in careful.generate([[5]] * 30, hot, ids) for t in g.response_ids) == 258


def test_teachers_are_told_apart_by_their_weights_and_not_by_their_folder(world, tmp_path):
    import shutil

    run_stage0(stage0_options(world, tmp_path / "a"))
    elsewhere = shutil.copytree(world.static, tmp_path / "renamed")
    run_stage0(stage0_options(world, tmp_path / "a", pretrained_checkpoint=elsewhere))
    about = json.loads((elsewhere / "zeda.json").read_text())
    (elsewhere / "zeda.json").write_text(json.dumps(about | {"source_sha256": "0" * 64}))
    with pytest.raises(UserError, match="teacher"):
        run_stage0(stage0_options(world, tmp_path / "a", pretrained_checkpoint=elsewhere))


def test_answers_of_stage_0_train_stage_1(world, tmp_path):
    run_stage0(stage0_options(world, tmp_path / "a.jsonl", temperature=1.0))
    run = tiny_world.start(world, data_path=tmp_path / "a.jsonl", train_iters=1, global_batch_size=1)
    run.run()
    assert run.consumed_tokens > 0


def test_the_order_of_answers_follows_from_the_prompts_tokens_alone(world, tmp_path):
    """Shorter prompts first, then by a hash: a run that trains on the file meets its rows in the same order as ever."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {letter}"}) + "\n" for letter in "abcdefghijkl"))
    lines = stage0_files.stage0(world, tmp_path / "out.jsonl", data_path=prompts).read_text().splitlines()
    asked = [json.loads(line)["prompt_ids"] for line in lines]
    hashes = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12] for ids in asked]
    assert len(set(map(len, asked))) == 1 and len(set(hashes)) == 12
    assert hashes == sorted(hashes)
