"""Response masks against transformers' own assistant mask, and templates that make it hard."""

import pytest
from transformers import AutoTokenizer

from zeda_megatron.data.conversation import tokenize_conversation, tokenize_rollout, tokenize_rollouts
from zeda_megatron.data.records import Rollout
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.errors import UserError


def turn(role, content):
    return {"role": role, "content": content}


TWO_TURNS = [
    turn("user", "Who?"),
    turn("assistant", "A fox."),
    turn("user", "Why?"),
    turn("assistant", "x + 1"),
]
# The shape of Qwen3's: an earlier turn loses its thinking.
FORGETFUL = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The shape of GLM's: no turn is closed, the next marker ends it.
OPEN_ENDED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
REWRITING = "{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages[0]['content'] }}"


@pytest.fixture
def tokenizer(hf_folder):
    return load_tokenizer(hf_folder)


@pytest.fixture
def with_template(hf_folder, tmp_path):
    def _load(template):
        file = tmp_path / "template.jinja"
        file.write_text(template)
        return load_tokenizer(hf_folder, chat_template_file=file)

    return _load


def response_text(sample, tokenizer):
    """Runs of response tokens as text."""
    runs, open_run = [], False
    for token, is_response in zip(sample.tokens, sample.is_response):
        if is_response and not open_run:
            runs.append([])
        if is_response:
            runs[-1].append(token)
        open_run = is_response
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("chat", [TWO_TURNS, TWO_TURNS[:2], [turn("system", "Be brief."), *TWO_TURNS]])
def test_response_mask_equals_the_assistant_mask_of_transformers(hf_folder, tokenizer, chat):
    sample = tokenize_conversation(chat, tokenizer, "prose")
    reference = AutoTokenizer.from_pretrained(hf_folder).apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    n = len(sample.tokens)
    assert reference["input_ids"][:n] == sample.tokens
    assert [bool(m) for m in reference["assistant_masks"][:n]] == sample.is_response
    # What is cut off is the newline that the template writes behind the last end token.
    assert tokenizer.decode(reference["input_ids"][n:]) == "\n"
    assert sum(reference["assistant_masks"]) == sum(sample.is_response)
    assert sample.kind == "prose"


def test_sample_is_what_sampling_this_answer_would_have_given(tokenizer):
    # The template ends its prompt with a newline; tokenised in one go it would fuse with the answer's.
    chat = [turn("user", "Continue"), turn("assistant", "\n\nreturn x")]
    prompt = tokenizer.chat_ids(chat[:1], True)
    response = [*tokenizer.encode(chat[1]["content"]), tokenizer.eos_id]
    assert tokenizer.encode("\n\n") != tokenizer.encode("\n") * 2, "the case needs a fused newline"
    sample = tokenize_conversation(chat, tokenizer)
    assert sample.tokens == prompt + response
    assert sample.is_response == [False] * len(prompt) + [True] * len(response)
    rollout = Rollout(chat, prompt_ids=prompt, response_ids=response)
    assert tokenize_rollout(rollout, tokenizer) == sample


def test_messages_after_the_last_answer_are_left_out(tokenizer):
    longer = [*TWO_TURNS, turn("user", "And then?")]
    assert tokenize_conversation(longer, tokenizer) == tokenize_conversation(TWO_TURNS, tokenizer)


def test_a_rewritten_earlier_turn_is_context_and_the_last_is_learned(with_template):
    tokenizer = with_template(FORGETFUL)
    thinking = [dict(message) for message in TWO_TURNS]
    for answer in thinking[1::2]:
        answer["content"] = "<think>hm</think>" + answer["content"]
    sample = tokenize_conversation(thinking, tokenizer)
    assert response_text(sample, tokenizer) == ["<think>hm</think>x + 1<|im_end|>"]
    assert sample.tokens == tokenizer.encode(tokenizer.render_chat(thinking, False).rstrip("\n"))
    # Without thinking nothing is rewritten, and both answers are learned.
    assert response_text(tokenize_conversation(TWO_TURNS, tokenizer), tokenizer) == [
        "A fox.<|im_end|>",
        "x + 1<|im_end|>",
    ]


def test_an_open_ended_template_learns_the_marker_that_ends_a_turn(with_template):
    tokenizer = with_template(OPEN_ENDED)
    tokenizer.eos_ids = frozenset([*tokenizer.encode("<|user|>"), tokenizer.eos_id])
    sample = tokenize_conversation(TWO_TURNS, tokenizer)
    assert response_text(sample, tokenizer) == ["A fox.<|user|>", "x + 1<|user|>"]
    assert tokenizer.decode(sample.tokens, skip_special_tokens=False) == (
        "<|user|>\nWho?<|assistant|>\nA fox.<|user|>\nWhy?<|assistant|>\nx + 1<|user|>"
    )
    tokenizer.eos_ids = frozenset([tokenizer.eos_id])
    assert response_text(tokenize_conversation(TWO_TURNS, tokenizer), tokenizer) == [
        "A fox.",
        "x + 1<|im_end|>",
    ]


def test_an_answer_that_was_cut_off_gets_no_end_token(tokenizer, with_template):
    for each in (tokenizer, with_template(OPEN_ENDED)):
        cut = Rollout(TWO_TURNS[:2], finish_reason="length")
        assert response_text(tokenize_rollout(cut, each), each) == ["A fox."]


def test_sentencepiece_responses_are_marked_too(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    sample = tokenize_conversation(TWO_TURNS, tokenizer)
    assert response_text(sample, tokenizer) == ["A fox.</s>", "x + 1</s>"]
    assert sample.tokens == tokenizer.chat_ids(TWO_TURNS, False)


def test_conversations_that_cannot_be_learned_are_refused(tokenizer, with_template):
    with pytest.raises(UserError, match="no assistant message"):
        tokenize_conversation(TWO_TURNS[:1], tokenizer)
    with pytest.raises(UserError, match="--chat-template-file"):
        tokenize_conversation(TWO_TURNS, with_template(REWRITING))


def test_token_ids_of_another_tokenizer_are_refused_by_number(tokenizer):
    rollouts = [Rollout(TWO_TURNS), Rollout(TWO_TURNS, prompt_ids=[1], response_ids=[99_999])]
    with pytest.raises(UserError, match=r"r.jsonl sample 2: token id 99999 is outside .* another tokenizer"):
        list(tokenize_rollouts(rollouts, tokenizer, 64, source="r.jsonl"))


def test_overlong_samples_are_skipped_cut_or_refused(tokenizer):
    fits = Rollout([], prompt_ids=[1, 2], response_ids=[3, 4])
    long = Rollout([], prompt_ids=[1, 2, 3], response_ids=[4, 5, 6])
    hopeless = Rollout([], prompt_ids=[1] * 9, response_ids=[4])
    unanswered = Rollout([], prompt_ids=[1, 2], response_ids=[])

    def tokens(overlong):
        rollouts = [fits, long, hopeless, unanswered]
        return [s.tokens for s in tokenize_rollouts(rollouts, tokenizer, 4, overlong, "r.jsonl")]

    assert tokens("skip") == [[1, 2, 3, 4]]
    assert tokens("truncate") == [[1, 2, 3, 4], [1, 2, 3, 4]]
    with pytest.raises(UserError, match=r"r.jsonl sample 2 has 6 tokens, more than --seq-length 4"):
        tokens("error")
    with pytest.raises(UserError, match="--overlong 'drop' is unknown"):
        tokens("drop")
