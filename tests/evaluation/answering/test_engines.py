"""Engines: the same answers from transformers, Megatron and a server; batches and order change nothing."""

import json
import shutil

import openai_stand_in
import pytest

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering.engine import Origin, Request, fingerprint, stream_of
from zeda_megatron.evaluation.answering.megatron_engine import MegatronEngine
from zeda_megatron.evaluation.answering.openai_engine import OpenAIEngine
from zeda_megatron.evaluation.answering.options import RunOptions, engine_name
from zeda_megatron.evaluation.answering.transformers_engine import TransformersEngine

SAMPLING = SamplingConfig(max_new_tokens=12, temperature=0.6, top_p=0.95, top_k=20, seed=5)
TEXTS = ["one two three", "a", "red green blue cat dog bird", "the 1 2 3"]
REQUESTS = [
    Request([{"role": "user", "content": text}], stream_of("b", str(i), 0), f"b {i}")
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def dynamic_hf(world, one_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    megatron_to_hf(world.dynamic, world.hf, folder)
    return folder


def megatron(model, **more) -> MegatronEngine:
    return MegatronEngine(RunOptions(model=str(model), **more))


def same(first, second, share=1e-6):
    for a, b in zip(first, second, strict=True):
        assert (a.text, a.tokens, a.prompt_tokens, a.finish) == (b.text, b.tokens, b.prompt_tokens, b.finish)
        assert a.zero_share == pytest.approx(b.zero_share, abs=share)


def test_batches_change_nothing(dynamic_hf):
    together = TransformersEngine(str(dynamic_hf), batch=4).answer(REQUESTS, SAMPLING)
    engine = TransformersEngine(str(dynamic_hf))
    alone = [engine.answer([request], SAMPLING)[0] for request in REQUESTS]
    same(together, alone)
    assert len({answer.text for answer in together}) == len(TEXTS)
    assert min(answer.zero_share for answer in together) > 0


@pytest.mark.parametrize("kind", ["static", "shared", "paired"])
def test_megatron_and_transformers_give_the_same_answers_and_shares(
    kind, world, dynamic_hf, paired_export, one_process
):
    checkpoint, folder = {
        "static": (world.static, world.hf),
        "shared": (world.dynamic, dynamic_hf),
        "paired": paired_export,
    }[kind]
    ours = megatron(checkpoint).answer(REQUESTS, SAMPLING)
    theirs = TransformersEngine(str(folder), batch=3).answer(REQUESTS, SAMPLING)
    same(ours, theirs)
    assert all((answer.zero_share == 0) == (kind == "static") for answer in ours)


def test_the_share_of_a_row_is_what_the_model_counts(dynamic_hf):
    engine = TransformersEngine(str(dynamic_hf))
    engine.model.reset_zero_share()
    (answer,) = engine.answer(REQUESTS[:1], SAMPLING)
    shares = engine.model.zero_share()
    assert len(shares) == 2 and shares[0] != shares[1]
    assert answer.zero_share == pytest.approx(sum(shares) / 2, abs=1e-9)


def test_a_pick_rule_and_the_mask_show_in_the_share(world, one_process):
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    halved = megatron(world.static, moe_pick_rule="topk=1").answer(REQUESTS, sampling)
    assert [answer.zero_share for answer in halved] == pytest.approx([2 / 3] * 4)
    masked = megatron(world.dynamic, mask=True)
    assert [answer.zero_share for answer in masked.answer(REQUESTS, sampling)] == [0.0] * 4
    assert masked.about.settings["mask"] is True
    assert masked.about.origin == Origin(zero_experts=False, adapted_steps=0)


def test_the_dial_turns(dynamic_hf, world):
    more = TransformersEngine(str(dynamic_hf), dial=20.0).answer(REQUESTS[:1], SAMPLING)[0]
    assert more.zero_share > 0.9
    with pytest.raises(UserError, match="has no zero experts"):
        TransformersEngine(str(world.hf), dial=1.0)


def test_heads_of_paired_experts_are_counted(paired_export, one_process):
    # 8 experts, 3 picks, 16 wide, a gated MLP has three matrices: 8 / (3 * 3 * 16).
    assert TransformersEngine(str(paired_export[1])).about.head_flops == pytest.approx(8 / 144)
    assert megatron(paired_export[0]).about.head_flops == pytest.approx(8 / 144)
    assert megatron(paired_export[0]).about.origin.zero_experts is True


def test_a_dial_the_model_refuses_is_told(dynamic_hf, paired_export):
    """Which dial turns is a matter of the config; what it refuses is an error, not the other dial's business."""
    with pytest.raises(UserError, match=r"--zero-dial nan: .*zce_logit_bias"):
        TransformersEngine(str(dynamic_hf), dial=float("nan"))
    with pytest.raises(UserError, match=r"--zero-dial nan: .*zce_threshold"):
        TransformersEngine(str(paired_export[1]), dial=float("nan"))


LEAKS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "num_beams": 2,
    "num_return_sequences": 2,
    "min_new_tokens": 11,
    "max_time": 1e-9,
    "suppress_tokens": list(range(3, 20)),
    "begin_suppress_tokens": list(range(3, 20)),
    "bad_words_ids": [[i] for i in range(3, 20)],
    "sequence_bias": [[[5], 100.0]],
    "forced_bos_token_id": 5,
    "exponential_decay_length_penalty": [1, 5.0],
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["a", "e"],
    "encoder_repetition_penalty": 2.0,
    "cache_implementation": "static",
    "use_cache": False,
    "return_dict_in_generate": True,
    "output_scores": True,
}


def test_nothing_of_the_models_generation_config_reaches_the_answers(dynamic_hf, tmp_path):
    changed = shutil.copytree(dynamic_hf, tmp_path / "changed")
    file = changed / "generation_config.json"
    named = json.loads(file.read_text()) if file.is_file() else {}
    stops = {key: value for key, value in named.items() if key.endswith("token_id")}
    first = TransformersEngine(str(dynamic_hf), batch=2)
    file.write_text(json.dumps({**stops, "repetition_penalty": 1.5, "use_cache": False}))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    second = TransformersEngine(str(changed), batch=2)
    for temperature in (0.0, 0.6):
        sampling = SamplingConfig(max_new_tokens=12, temperature=temperature)
        wanted = first.answer(REQUESTS[:2], sampling)
        same(wanted, second.answer(REQUESTS[:2], sampling))
        for name, value in LEAKS.items():
            setattr(second.model.generation_config, name, value)
            same(wanted, second.answer(REQUESTS[:2], sampling))


def test_a_long_neighbour_takes_no_room(world):
    """Each row of a batch has its own limit: the model's context without its own prompt."""
    engine = TransformersEngine(str(world.hf), batch=3)
    long = Request([{"role": "user", "content": "the " * 45}], 7, "b 9")
    sampling = SamplingConfig(max_new_tokens=250, temperature=0.6)
    batch = [REQUESTS[0], long, REQUESTS[1]]
    together = engine.answer(batch, sampling)
    same(together, [engine.answer([one], sampling)[0] for one in batch])
    assert all(a.prompt_tokens + a.tokens <= 256 for a in together)
    assert len({a.prompt_tokens + a.tokens for a in together if a.finish == "length"}) <= 1


def test_an_answer_shows_the_thinking_that_its_prompt_opened(
    dynamic_hf, world, one_process, server, tmp_path
):
    opened = shutil.copytree(dynamic_hf, tmp_path / "opened")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>"
    (opened / "chat_template.jinja").write_text(template)
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    engine = TransformersEngine(str(opened))
    (answer,) = engine.answer(REQUESTS[:1], sampling)
    assert answer.text.startswith("<think>") and answer.finish == "length"
    ours = megatron(world.dynamic)
    ours.tokenizer.template = template
    assert ours.answer(REQUESTS[:1], sampling)[0].text == answer.text
    ours.tokenizer.template = template.replace("<think>", "<think></think>")
    assert "<think>" not in ours.answer(REQUESTS[:1], sampling)[0].text

    def said(finish, config=None, **message):
        server.reply = (200, {"choices": [{"message": message, "finish_reason": finish}]})
        (got,) = OpenAIEngine(server.url, config_folder=config).answer(REQUESTS[:1], sampling)
        return got.text, got.finish

    assert said("length", content="hm") == ("<think>hm", "length")  # nobody knows the prompt: no answer
    assert said("length", str(dynamic_hf), content="hm") == ("hm", "length")
    assert said("length", str(opened), content="hm") == ("<think>hm", "length")
    assert said("stop", str(opened), content="hm</think>4") == ("hm</think>4", "stop")
    assert said("length", reasoning_content="hm", content=None) == ("<think>hm", "length")
    assert said("stop", reasoning="hm", content="4") == ("<think>hm</think>4", "stop")
    for cut in ("abort", "content_filter", "error"):
        assert said(cut, content="<think>hm</think>4")[1] == "length"


def test_who_changes_what_the_model_is_given_makes_another_run(dynamic_hf, tmp_path):
    conversations = [request.messages for request in REQUESTS]
    copy = shutil.copytree(dynamic_hf, tmp_path / "copy")

    def known():
        return TransformersEngine(str(copy)).about.prompts(conversations)

    first = TransformersEngine(str(dynamic_hf)).about.prompts(conversations)
    assert known() == first
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text("x" + template)
    assert known() != first
    (copy / "chat_template.jinja").write_text(template)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert known() != first


def test_a_prompt_that_is_too_long_is_named(world):
    engine = TransformersEngine(str(world.hf))
    long = Request([{"role": "user", "content": "x" * 400}], 1, "gsm8k q7")
    with pytest.raises(UserError, match=r"gsm8k q7: its prompt has \d+ tokens, the model's context 256"):
        engine.answer([long], SAMPLING)


def test_other_weights_have_another_fingerprint(world, tmp_path):
    copy = shutil.copytree(world.hf, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(world.hf)
    file = next(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(copy) != fingerprint(world.hf)
    assert fingerprint(world.static) != fingerprint(world.dynamic)


def test_the_engine_follows_from_the_model(world):
    names = [
        engine_name(RunOptions(model=str(m))) for m in (world.hf, world.static, "http://localhost:8000/v1")
    ]
    assert names == ["transformers", "megatron", "openai"]


@pytest.fixture
def server():
    made = openai_stand_in.Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_server_is_asked_as_the_paper_samples(server, dynamic_hf):
    server.engine = TransformersEngine(str(dynamic_hf))
    engine = OpenAIEngine(server.url, parallel=2, config_folder=str(dynamic_hf))
    answers = engine.answer(REQUESTS, SAMPLING)
    order, headers = server.seen[0]
    assert (order["temperature"], order["top_p"], order["top_k"], order["max_tokens"]) == (0.6, 0.95, 20, 12)
    assert order["model"] == "tiny" and "Authorization" not in headers
    assert len({order["seed"] for order, _ in server.seen}) == len(REQUESTS)
    assert all(answer.tokens > 0 and 0 < answer.zero_share < 1 for answer in answers)
    same(answers, engine.answer(REQUESTS, SAMPLING))
    assert engine.about.config["zce_nums"] == [4] and engine.about.origin.zero_experts is True


def test_a_busy_server_is_asked_again_and_a_refusal_is_told(server, quick, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.reply = (200, {"choices": [{"message": {"reasoning_content": "hm", "content": "4"}}], "usage": {}})
    server.busy = 3
    engine = OpenAIEngine(server.url, key_variable="MY_KEY")
    (answer,) = engine.answer(REQUESTS[:1], SAMPLING)
    assert (answer.text, answer.zero_share) == ("<think>hm</think>4", None)
    assert len(server.seen) == 4 and server.seen[0][1]["Authorization"] == "Bearer secret"
    server.busy = 99
    with pytest.raises(UserError, match="503 Service Unavailable: busy"):
        engine.answer(REQUESTS[:1], SAMPLING)
    server.busy, server.reply = 0, (400, "too long")
    with pytest.raises(UserError, match="400 Bad Request: too long"):
        engine.answer(REQUESTS[:1], SAMPLING)
    server.reply = (200, {"choices": []})
    with pytest.raises(UserError, match=r"its answer to b 0 has no (message|choice)"):
        engine.answer(REQUESTS[:1], SAMPLING)


MESSAGE = {"message": {"content": "4"}, "finish_reason": "stop"}
ODD = {
    "a list": [],
    "a number": 5,
    "nothing": None,
    "no choices": {"choices": None},
    "choices of numbers": {"choices": [5]},
    "message of text": {"choices": [{"message": "4"}]},
    "content a number": {"choices": [{"message": {"content": 5}}]},
    "content an object": {"choices": [{"message": {"content": {"text": "4"}}}]},
    "thinking a list": {"choices": [{"message": {"content": "4", "reasoning": ["hm"]}}]},
    "finish a list": {"choices": [{**MESSAGE, "finish_reason": ["stop"]}]},
    "usage a list": {"choices": [MESSAGE], "usage": [1]},
    "tokens as text": {"choices": [MESSAGE], "usage": {"completion_tokens": "5"}},
    "tokens below zero": {"choices": [MESSAGE], "usage": {"prompt_tokens": -1}},
    "tokens without end": {"choices": [MESSAGE], "usage": {"prompt_tokens": float("inf")}},
    "share of text": {"choices": [MESSAGE], "usage": {"zero_share": "half"}},
    "share above one": {"choices": [MESSAGE], "usage": {"zero_share": 1.5}},
    "share that is none": {"choices": [MESSAGE], "usage": {"zero_share": float("nan")}},
    "nested": "[" * 100_000,
    "long number": '{"choices": %s}' % ("9" * 5000),
    "no text": b"\xff\xfe\xfa",
    "too long": " " * (5 << 20),
}


@pytest.mark.parametrize("reply", ODD.values(), ids=ODD)
def test_a_server_that_says_odd_things_is_told_in_one_line(server, quick, reply):
    engine = OpenAIEngine(server.url, "tiny")
    server.reply = (200, reply)
    with pytest.raises(UserError, match=server.url) as error:
        engine.answer(REQUESTS[:1], SAMPLING)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_half_a_surrogate_pair_of_a_server_is_replaced(server):
    server.reply = (200, '{"choices": [{"message": {"content": "a\\ud800b\\ud83d\\ude00"}}]}')
    assert OpenAIEngine(server.url, "tiny").answer(REQUESTS[:1], SAMPLING)[0].text == "a\ufffdb\U0001f600"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(server, quick, code, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    other = openai_stand_in.Server()
    try:
        server.redirect = code, f"{other.url}/chat/completions"
        with pytest.raises(UserError, match=rf"redirects \({code}\) to {other.url}"):
            OpenAIEngine(server.url, "tiny").answer(REQUESTS[:1], SAMPLING)
        with pytest.raises(UserError, match="redirects"):
            OpenAIEngine(server.url)
        assert OpenAIEngine(server.url, "tiny").slots() is None
        assert other.seen == []
    finally:
        other.shutdown()
        other.server_close()


def test_a_key_is_never_repeated(server, quick, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.reply = (400, "your key secret is wrong\nindeed")
    with pytest.raises(UserError, match=r"your key \*\*\* is wrong indeed"):
        OpenAIEngine(server.url, "tiny").answer(REQUESTS[:1], SAMPLING)
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(UserError) as error:
        OpenAIEngine(server.url, "tiny")
    assert "sec" not in str(error.value)
    with pytest.raises(UserError, match="begins with http"):
        OpenAIEngine("file:///etc/passwd", "tiny")


def test_a_server_with_several_models_or_none_there_is_named(server, quick):
    server.models = ["a", "b"]
    with pytest.raises(UserError, match=r"serves 2 models \(a, b\); give one with --served-model"):
        OpenAIEngine(server.url)
    with pytest.raises(UserError, match="no answer"):
        OpenAIEngine("http://127.0.0.1:9/v1")


def test_counters_of_the_vllm_plugin_are_read(server):
    engine = OpenAIEngine(server.url)
    assert engine.slots() == (0, 0)  # a fresh server, or one without the plugin
    server.metrics = (
        "# HELP zeda:zero_slots Routed slots that chose a zero expert.\n"
        'zeda:zero_slots_total{layer="0"} 10.0\nzeda:zero_slots_total{layer="1"} 20.0\n'
        'zeda:zero_slots_created{layer="0"} 1.7e9\n'
        'zeda:routed_slots_total{layer="0"} 40.0\nzeda:routed_slots_total{layer="1"} 40.0\n'
    )
    assert engine.slots() == (30, 80)
