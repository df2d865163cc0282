"""What text teaches: end tokens, pieces that follow one another, markers, dates, whatever the tokenizer's kind."""

import datetime
import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from zeda_megatron.data.conversation import pieces_differ, tokenize_conversation, tokenize_rollouts
from zeda_megatron.data.records import Rollout
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.errors import UserError

TEXT = [
    "The quick brown fox answers: yes.\n",
    "[INST] Hi there [/INST] answer one two\n",
    "user\nWho?\nassistant\nA fox. 12 345\n\n  indented",
] * 5
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The shape of Qwen3's thinking models: the prompt opens the thought, and a turn without one gets an empty one.
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}"
    "{% set r = m['reasoning_content'] | default('') %}{% if '</think>' in c %}{% set r = c.split('</think>')[0] %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n<think>\n' + r.strip('\n') + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Qwen3's own: the prompt opens nothing, the model writes <think> itself.
SELF_OPENED = THINKING.replace("assistant\n<think>\n' }}{% endif %}", "assistant\n' }}{% endif %}")
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML


def talk(answer, **more):
    return [{"role": "user", "content": "Who is 12?"}, {"role": "assistant", "content": answer, **more}]


def byte_level(prefix=False, normalizer=None):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    return trained(made, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama2():
    """A space before every piece, by a normalizer."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    # Words apart: a small text would give merges over their bounds.
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return trained(made, trainers.BpeTrainer)


def metaspace(scheme, model=models.BPE, trainer=trainers.BpeTrainer, **more):
    made = Tokenizer(model(unk_token="<unk>") if model is models.BPE else model())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(made, trainer, **more)


def wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return trained(made, trainers.WordPieceTrainer)


def trained(made, trainer, **more):
    letters = {"initial_alphabet": [chr(i) for i in range(33, 127)] + ["▁", "\n"]} | more
    made.train_from_iterator(
        TEXT, trainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False, **letters)
    )
    return made


KINDS = {
    "bytes": byte_level,
    "bytes with a space before": lambda: byte_level(prefix=True),
    "bytes, stripped": lambda: byte_level(normalizer=normalizers.Strip()),
    "llama 2": llama2,
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "unigram": lambda: metaspace("always", models.Unigram, trainers.UnigramTrainer, unk_token="<unk>"),
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def _folder(kind="bytes", template=CHATML, eos="<|im_end|>", **files):
        if kind not in made:
            made[kind] = KINDS[kind]()
        folder = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(
            tokenizer_object=made[kind],
            bos_token="<s>",
            eos_token=eos,
            unk_token="<unk>",
            chat_template=template,
        ).save_pretrained(folder)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return _folder


@pytest.fixture
def load(folder_of):
    return lambda *args, **kwargs: load_tokenizer(folder_of(*args, **kwargs))


def learned(tokenizer, messages, complete=True):
    sample = tokenize_conversation(messages, tokenizer, complete=complete)
    return tokenizer.written_out([t for t, r in zip(sample.tokens, sample.is_response) if r])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_conversation_in_pieces_is_the_conversation_as_a_whole(load, kind, template):
    tokenizer = load(kind, template, "<|im_end|>" if template == CHATML else "</s>")
    for answer in ("answer", "answer one two", "yes.", "12", "The fox", "fox. 12 345"):
        for messages in (talk(answer), talk(answer) * 3):
            sample = tokenize_conversation(messages, tokenizer)
            whole, prompt = tokenizer.chat_ids(messages, False), tokenizer.chat_ids(messages[:-1], True)
            assert sample.tokens == whole[: len(sample.tokens)], (answer, len(messages))
            assert sample.tokens[: len(prompt)] == prompt
            assert not any(sample.is_response[: len(tokenizer.chat_ids(messages[:1], True))])
            assert pieces_differ([Rollout(messages)], tokenizer) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_over_the_end_of_the_prompt_is_parted_and_the_text_stays(load, kind):
    tokenizer = load(kind)
    for answer in ("\n\nanswer", "\nyes", " lead"):
        sample = tokenize_conversation(talk(answer), tokenizer)
        prompt = tokenizer.chat_ids(talk("")[:1], True)
        assert sample.tokens[: len(prompt)] == prompt
        whole = tokenizer.written_out(tokenizer.chat_ids(talk(answer), False))
        assert whole.startswith(tokenizer.written_out(sample.tokens))


def test_a_tokenizer_that_reads_pieces_otherwise_is_said(folder_of):
    folder = folder_of()
    made = json.loads((folder / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Replace", "pattern": {"Regex": "assistant\nS"}, "content": "assistant: s"}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    line = pieces_differ([], load_tokenizer(folder))
    assert f"tokenizer {folder}: a conversation encoded in pieces" in line and line.isprintable()


def test_the_end_token_is_the_one_that_the_template_writes(load):
    for eos, files in (
        ("<|im_end|>", {}),
        ("</s>", {}),
        ("</s>", {"generation_config": {"eos_token_id": [2, 4]}}),
        ("</s>", {"config": {"eos_token_id": 2}}),
    ):
        tokenizer = load(eos=eos, **files)
        end = tokenizer.encode("<|im_end|>")[0]
        assert tokenizer.eos_id == end and end in tokenizer.eos_ids
        assert tokenizer.encode(eos)[0] in tokenizer.eos_ids
        assert learned(tokenizer, talk("yo")) == "yo<|im_end|>"
        named = eos == "<|im_end|>" or 4 in files.get("generation_config", {}).get("eos_token_id", [])
        assert bool(tokenizer.notes) is not named
    assert "ends a turn with '<|im_end|>', its files name '</s>'" in load(eos="</s>").notes[0]


def test_a_template_that_closes_no_turn_ends_it_with_the_next_marker(load):
    tokenizer = load(template=OPEN_ENDED, eos="</s>")
    assert tokenizer.eos_ids == {2, 3} and tokenizer.eos_id == 2
    assert learned(tokenizer, talk("yo") * 2) == "yo<|im_start|>yo<|im_start|>"
    begins_anew = OPEN_ENDED.replace("'<|im_start|>' + m['role'] + '\n'", "'<s>'").replace(
        "<|im_start|>", "<s>"
    )
    assert load(template=begins_anew, eos="</s>").eos_ids == {2}, "the beginning of a text ends nothing"


def test_an_end_that_is_no_token_is_said_and_odd_templates_are_left_to_those_who_use_them(load):
    written = CHATML.replace("<|im_end|>", "[END]")
    assert "ends a turn with '[END]\\n', which is no token" in load(template=written).notes[0]
    for odd in ("{{ 1 / 0 }}", "{{ messages.foo.bar }}", "{% for i in range(10**9) %}{% endfor %}"):
        tokenizer = load(template=odd)
        with pytest.raises(UserError, match="refuses a conversation: "):
            tokenizer.chat_ids(talk("yo"), False)
    with pytest.raises(UserError, match=r"chat template of .*: Expected an expression"):
        load(template="{% if %}")
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}" + CHATML
    tokenizer = load(template=picky)
    conversation = Rollout([{"role": "system", "content": "s"}, *talk("yo")])
    with pytest.raises(UserError, match=r"r.jsonl sample 2: chat template of .*: no system") as told:
        list(tokenize_rollouts([Rollout(talk("yo")), conversation], tokenizer, 99, source="r.jsonl"))
    assert str(told.value).isprintable()


def test_of_several_templates_the_default_counts(folder_of, load):
    tokenizer = load(template={"default": CHATML, "tool_use": "tools"})
    assert tokenizer.template == CHATML and learned(tokenizer, talk("yo")) == "yo<|im_end|>"
    folder = folder_of(template=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).template == CHATML
    with pytest.raises(UserError, match=r"multiple chat templates .*'rag'"):
        load(template={"rag": CHATML, "tool_use": "tools"})


def test_a_template_that_strips_or_begins_a_text_is_taken_as_it_is(load):
    assert learned(load(template=CHATML.replace("m['content']", "m['content'] | trim")), talk(" yo \n")) == (
        "yo<|im_end|>"
    )
    tokenizer = load(template="{{ bos_token }}" + CHATML)
    ids = tokenizer.chat_ids(talk("yo"), False)
    assert (
        ids.count(tokenizer.bos_id) == 1 and tokenize_conversation(talk("yo"), tokenizer).tokens.count(1) == 1
    )


def test_ids_with_gaps_count_to_the_largest(folder_of):
    folder = folder_of()
    made = json.loads((folder / "tokenizer.json").read_text())
    end = next(token for token in made["added_tokens"] if token["content"] == "<|im_end|>")
    end["id"] = made["model"]["vocab"]["<|im_end|>"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(made))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (5000, 5001)
    ids = Rollout(talk("yo"), prompt_ids=[5], response_ids=[6, 5000])
    assert next(tokenize_rollouts([ids], tokenizer, 99)).tokens == [5, 6, 5000]
    with pytest.raises(UserError, match="5001 is outside the tokenizer's vocabulary of 5001"):
        next(tokenize_rollouts([Rollout(talk("yo"), prompt_ids=[5], response_ids=[5001])], tokenizer, 99))


@pytest.mark.parametrize("kind", ["bytes", "llama 2", "metaspace first"])
def test_markers_inside_an_answer_survive_decoding_and_its_frame_does_not(load, kind):
    tokenizer = load(kind)
    text = "<think>Hi</think>yes<tool_call>12</tool_call>"
    ids = tokenizer.encode(text)
    said = tokenizer.decode([1, *ids, tokenizer.eos_id, tokenizer.pad_id, tokenizer.pad_id])
    assert said.replace(" ", "") == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.written_out(ids)


CUT_OFF = [
    # template, answer, thought, what is learned of it when it was cut off
    (THINKING, "Let me think", "", ""),
    (THINKING, "<think>\nLet me think", "", ""),
    (THINKING, "Let me\n</think>\n\nThe ans", "", "Let me\n</think>\n\nThe ans"),
    (THINKING, "Let me</think>The ans", "", ""),
    (THINKING, "", "Let me think", ""),
    (THINKING, "The ans", "Let me", "Let me\n</think>\n\nThe ans"),
    (SELF_OPENED, "<think>\nLet me think", "", ""),
    (SELF_OPENED, "The ans", "", "<think>\n\n</think>\n\nThe ans"),
    (SELF_OPENED, "", "Let me think", ""),
    (SELF_OPENED, "The ans", "Let me", "<think>\nLet me\n</think>\n\nThe ans"),
    (CHATML, "<think>\nLet me think", "", "<think>\nLet me think"),
    (CHATML, "The ans", "", "The ans"),
    (CHATML.replace("m['content'] +", "m['content'] + ' ' +"), "The ans", "", "The ans"),
    (CHATML.replace("m['content']", "m['content'] | trim"), "\nThe ans \n", "", "The ans"),
    (OPEN_ENDED, "The ans", "", "The ans"),
]


@pytest.mark.parametrize(("template", "answer", "thought", "teaches"), CUT_OFF)
def test_an_answer_that_was_cut_off_never_teaches_to_end_a_thought(load, template, answer, thought, teaches):
    tokenizer = load(template=template)
    messages = talk(answer, reasoning_content=thought) if thought else talk(answer)
    text = learned(tokenizer, messages, complete=False)
    if (template, answer) != (THINKING, "Let me</think>The ans"):  # its line breaks are the template's
        assert text == teaches
    lines, ids = [], Rollout(messages, None, "", [5, 6], [7], "length")
    rollouts = [Rollout(messages, finish_reason="length"), Rollout(talk("ok")), ids]
    samples = list(tokenize_rollouts(rollouts, tokenizer, 999, source="r.jsonl", say=lines.append))
    assert len(samples) == (3 if text else 2) and samples[-1].tokens == [5, 6, 7]
    wanted = [
        "r.jsonl: 1 of 3 answers left out: cut off while thinking, without token ids, and the chat template"
    ]
    assert [line[: len(wanted[0])] for line in lines] == ([] if text else wanted)


def test_whole_answers_with_and_without_thoughts_are_learned_as_the_template_writes_them(load):
    tokenizer = load(template=THINKING)
    assert learned(tokenizer, talk("hm</think>yes")) == "hm\n</think>\n\nyes<|im_end|>"
    assert learned(tokenizer, talk("yes", reasoning_content="hm")) == "hm\n</think>\n\nyes<|im_end|>"
    assert learned(tokenizer, talk("yes")) == "\n</think>\n\nyes<|im_end|>"
    for reason, count in (("stop", 1), (None, 1), ("length", 0), ("abort", 0), ("max_tokens", 0)):
        cut = Rollout(talk("Let me think"), finish_reason=reason)
        assert len(list(tokenize_rollouts([cut], tokenizer, 99))) == count, reason


def test_what_is_left_out_as_overlong_is_counted(load):
    tokenizer, lines = load(), []
    rollouts = [Rollout(talk("yes")), Rollout(talk("yes " * 99)), Rollout(talk("x" * 20_000_000))]
    assert len(list(tokenize_rollouts(rollouts, tokenizer, 99, "skip", "r.jsonl", lines.append))) == 1
    assert lines == ["r.jsonl: 2 of 3 conversations left out, longer than --seq-length 99"]
    with pytest.raises(
        UserError, match=r"r.jsonl sample 1 has far too many tokens, more than --seq-length 99"
    ):
        list(tokenize_rollouts(rollouts[2:], tokenizer, 99, "error", "r.jsonl"))


def test_the_day_of_a_dated_template_is_given_and_the_tokenizer_is_told_apart_by_it(folder_of, monkeypatch):
    day = datetime.date(2020, 5, 17)
    folder = folder_of(template=DATED)
    then, now = load_tokenizer(folder, day=day), load_tokenizer(folder)
    assert then.render_chat(talk("yo"), False).startswith("2020-05-17<|im_start|>")
    assert then.notes == [
        f"the chat template of {folder} writes the date: always 2020-05-17 here, so that a resumed run reads the same"
    ]
    before = now.fingerprint()

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert now.render_chat(talk("yo"), False).startswith("2031-01-02")
    assert then.render_chat(talk("yo"), False).startswith("2020-05-17")
    assert now.fingerprint() == before != then.fingerprint()
    plain = load_tokenizer(folder_of(), day=day)
    assert not plain.tells_the_day and plain.notes == [] and now.tells_the_day
    assert plain.fingerprint() == load_tokenizer(folder_of()).fingerprint()
    then.save(folder / "copy")
    assert load_tokenizer(folder / "copy").template == DATED


def test_fingerprints_tell_tokenizers_and_templates_apart(load):
    made = [load(), load(template=CHATML + " "), load("llama 2"), load(eos="</s>", template=CHATML)]
    assert len({tokenizer.fingerprint() for tokenizer in made}) == 4
    assert load().fingerprint() == made[0].fingerprint()


@pytest.fixture(scope="module")
def marked_sentencepiece(tmp_path_factory):
    """A sentencepiece model with chat markers as control pieces, and thinking as symbols of the user."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=200,
        model_type="bpe",
        byte_fallback=False,
        hard_vocab_limit=False,
        control_symbols=["<|im_start|>", "<|im_end|>", "</think>"],
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_sentencepiece_keeps_the_same_promises(marked_sentencepiece, tmp_path):
    def load(template, **more):
        (tmp_path / "t.jinja").write_text(template)
        return load_tokenizer(marked_sentencepiece, "auto", tmp_path / "t.jinja", **more)

    tokenizer = load(CHATML.replace("\n", ""))
    end = tokenizer.encode("<|im_end|>")
    assert [tokenizer.eos_id] == end and tokenizer.eos_ids == {2, *end}
    assert "ends a turn with '<|im_end|>', its files name '</s>'" in tokenizer.notes[0]
    for messages in (talk("answer one two"), talk("yes.") * 2):
        sample = tokenize_conversation(messages, tokenizer)
        assert sample.tokens == tokenizer.chat_ids(messages, False)
        assert pieces_differ([Rollout(messages)], tokenizer) is None
    assert learned(tokenizer, talk("yes.")) == "yes.<|im_end|>"
    ids = tokenizer.encode("<think>Hi</think>yes")
    assert tokenizer.decode([1, *ids, *end, tokenizer.pad_id]).replace(" ", "") == "<think>Hi</think>yes"
    dated = load("{{ strftime_now('%Y') }}" + CHATML, day=datetime.date(2020, 5, 17))
    assert dated.render_chat(talk("yo"), True).startswith("2020<|im_start|>")
    assert tokenizer.fingerprint() != dated.fingerprint()
    thinking = load(THINKING.replace("\n", ""))
    assert "</think>" not in learned(thinking, talk("Let me think"), complete=False)
