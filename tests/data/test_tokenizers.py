"""Tokenizer adapters against the libraries they wrap."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.errors import UserError

CHAT = [{"role": "user", "content": "Who? naïve 🙂"}, {"role": "assistant", "content": "\nA fox.\n"}]


def test_hf_ids_are_those_of_transformers(hf_folder):
    ours, theirs = load_tokenizer(hf_folder), AutoTokenizer.from_pretrained(hf_folder)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert ours.chat_ids(CHAT, prompt) == expected
    text = "def f(x): <|im_end|> 🙂"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def test_end_tokens_of_the_generation_config_count_and_survive_saving(hf_folder, tmp_path):
    first = tmp_path / "model"
    load_tokenizer(hf_folder).save(first)
    (first / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    load_tokenizer(first).save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.eos_ids == {0, 2}
    assert copy.eos_id == 2
    assert copy.chat_ids(CHAT, True) == load_tokenizer(hf_folder).chat_ids(CHAT, True)


def test_template_file_and_arguments_reach_the_template(hf_folder, sentencepiece_file, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0]['content'] }}{% if loud is defined and loud %}!{% endif %}")
    for path in (hf_folder, sentencepiece_file):
        tokenizer = load_tokenizer(path, chat_template_file=file, template_args={"loud": True})
        assert tokenizer.render_chat([{"role": "user", "content": "hi"}], True) == "hi!"


def test_sentencepiece_ids_are_those_of_the_library(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "The quick brown fox 🙂"
    assert tokenizer.encode(text) == model.encode(text)
    assert tokenizer.decode(model.encode(text)) == text
    assert tokenizer.encode("</s>") == [model.eos_id()]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (model.eos_id(), model.eos_id())
    assert tokenizer.vocab_size == model.vocab_size()


def test_sentencepiece_plain_chat_format_reads_as_documented(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    assert tokenizer.render_chat(chat, False) == "<s>User: Who? Assistant: A fox.</s>"
    assert tokenizer.render_chat(chat[:1], True) == "<s>User: Who? Assistant:"
    ids = tokenizer.chat_ids(chat, False)
    assert ids[0] == 1
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "User: Who? Assistant: A fox."
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>User: Who? Assistant: A fox.</s>"
    assert ids[: len(tokenizer.chat_ids(chat[:1], True))] == tokenizer.chat_ids(chat[:1], True)


def test_sentencepiece_folder_survives_saving(sentencepiece_file, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}{{ eos_token }}")
    load_tokenizer(sentencepiece_file, chat_template_file=template).save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    again.save(tmp_path / "saved")
    assert again.chat_ids([{"role": "user", "content": "The fox"}], False)[-1] == again.eos_id
    assert again.encode("The fox") == load_tokenizer(sentencepiece_file).encode("The fox")


def test_mistakes_are_named(hf_folder, sentencepiece_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.model").write_text("not a model")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    cases = [
        ((tmp_path / "nowhere",), {}, "nowhere: no such file or folder"),
        ((tmp_path / "empty",), {}, "empty: the folder has no tokenizer"),
        ((tmp_path / "empty", "sentencepiece"), {}, "has no tokenizer.model"),
        ((tmp_path / "bad.model",), {}, "bad.model: not a sentencepiece model"),
        ((sentencepiece_file, "hf"), {}, "the kind hf needs a folder"),
        ((hf_folder, "gpt"), {}, "'gpt' is unknown"),
        ((hf_folder,), {"chat_template_file": tmp_path / "no.jinja"}, "--chat-template-file"),
        ((sentencepiece_file,), {"chat_template_file": tmp_path / "bad.jinja"}, "chat template of"),
    ]
    for args, options, message in cases:
        with pytest.raises(UserError) as error:
            load_tokenizer(*args, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_template_and_a_refusing_one_are_named(hf_folder, sentencepiece_file, tmp_path):
    bare = AutoTokenizer.from_pretrained(hf_folder)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template; give one with --chat-template-file"):
        load_tokenizer(tmp_path / "bare").chat_ids(CHAT, True)
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{{ raise_exception('no system role') }}")
    for path in (hf_folder, sentencepiece_file):
        with pytest.raises(UserError, match="no system role"):
            load_tokenizer(path, chat_template_file=refusing).render_chat(CHAT, False)


def test_a_tokenizer_without_end_token_is_refused(hf_folder, tmp_path):
    endless = AutoTokenizer.from_pretrained(hf_folder)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match="no end token"):
        load_tokenizer(tmp_path / "endless")
