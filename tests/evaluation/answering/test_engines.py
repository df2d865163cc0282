"""Engines: the same answers from transformers, Megatron and a server; batches and order change nothing."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from zeda_megatron.checkpoint.convert import megatron_to_hf
from zeda_megatron.distill.sampling import SamplingConfig
from zeda_megatron.errors import UserError
from zeda_megatron.evaluation.answering.engine import Request, stream_of
from zeda_megatron.evaluation.answering.fingerprint import fingerprint
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


def test_the_dial_turns(dynamic_hf, world):
    more = TransformersEngine(str(dynamic_hf), dial=20.0).answer(REQUESTS[:1], SAMPLING)[0]
    assert more.zero_share > 0.9
    with pytest.raises(UserError, match="has no zero experts"):
        TransformersEngine(str(world.hf), dial=1.0)


def test_heads_of_paired_experts_are_counted(paired_export, one_process):
    # 8 experts, 3 picks, 16 wide, a gated MLP has three matrices: 8 / (3 * 3 * 16).
    assert TransformersEngine(str(paired_export[1])).about.head_flops == pytest.approx(8 / 144)
    assert megatron(paired_export[0]).about.head_flops == pytest.approx(8 / 144)


def test_a_prompt_that_is_too_long_is_named(world):
    engine = TransformersEngine(str(world.hf))
    long = Request([{"role": "user", "content": "x" * 400}], 1, "gsm8k q7")
    with pytest.raises(UserError, match=r"gsm8k q7: its prompt has \d+ tokens, the model's context 256"):
        engine.answer([long], SAMPLING)


def test_other_weights_have_another_fingerprint(world, tmp_path):
    import shutil

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


class Server(ThreadingHTTPServer):
    """Speaks the protocol around a transformers engine; can be busy, broken, or name a reasoning part."""

    def __init__(self, engine=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.lock, self.seen, self.busy = engine, threading.Lock(), [], 0
        self.models, self.metrics, self.reply = ["tiny"], "", None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, code: int, value) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/metrics":
            self.say(200, self.server.metrics)
        else:
            self.say(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((order, dict(self.headers)))
            if self.server.busy:
                self.server.busy -= 1
                return self.say(503, "busy")
            if self.server.reply is not None:
                return self.say(*self.server.reply)
            sampling = SamplingConfig(
                order["max_tokens"], order["temperature"], order["top_p"], order["top_k"], 0
            )
            answer = self.server.engine.answer([Request(order["messages"], order["seed"])], sampling)[0]
        usage = {"completion_tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens}
        usage["zero_share"] = answer.zero_share
        choice = {"message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.finish}
        return self.say(200, {"choices": [choice], "usage": usage})


@pytest.fixture
def server():
    made = Server()
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
    assert engine.about.config["zce_nums"] == [4]


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
    with pytest.raises(UserError, match="its answer to b 0 has no message"):
        engine.answer(REQUESTS[:1], SAMPLING)


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
