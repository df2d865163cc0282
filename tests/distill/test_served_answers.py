"""Stage 0 from servers: their answers are kept as the model's own would be, whatever a server does or says."""

import openai_stand_in
import pytest
import served_model
import stage0_files
import tiny_world
import vllm_world

from zeda_megatron.data.prompts import load_rollouts
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.errors import UserError
from zeda_megatron.runtime.openai_server import NoAnswer, OpenAIServer
from zeda_megatron.training import stage0

pytestmark = pytest.mark.usefixtures("one_process")
GREEDY = {"temperature": 0.0, "max_new_tokens": 5}


@pytest.fixture
def model(world):
    return served_model.Model(world.hf)


@pytest.fixture
def serve(model, monkeypatch):
    monkeypatch.setattr("zeda_megatron.runtime.openai_server.time.sleep", lambda seconds: None)
    made = []

    def start(complete=model):
        made.append(openai_stand_in.Server(complete=complete))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def ask(world, path, *servers, code=0, **values):
    urls = [server if isinstance(server, str) else server.url for server in servers]
    fields = {"rollout_engine": "openai", "rollout_url": urls, "hf_config": world.hf, "rollout_tries": 2}
    options = GREEDY | {"pretrained_checkpoint": None} | fields | values
    return stage0_files.stage0(world, path, code, **options)


def orders(*servers):
    return [order for server in servers for order, _ in server.seen if order["max_tokens"] > 1]


@pytest.mark.parametrize("api", ["tokens", "chat"])
def test_greedy_answers_of_two_servers_are_the_models_own(world, serve, tmp_path, api):
    servers = serve(), serve()
    own = stage0_files.stage0(world, tmp_path / "own.jsonl", **GREEDY, samples_per_prompt=2)
    path = ask(world, tmp_path / "served.jsonl", *servers, samples_per_prompt=2, rollout_api=api)
    assert stage0_files.answers(path) == stage0_files.answers(own)
    asked = orders(*servers)
    assert len(asked) == 18 == len({order["seed"] for order in asked}) and all(orders(one) for one in servers)


def test_no_default_of_the_server_has_a_say(world, serve, tmp_path):
    server, tokenizer = serve(), load_tokenizer(world.hf)
    ask(world, tmp_path / "a.jsonl", server, temperature=0.7, top_p=0.9)
    for order in orders(server):
        assert (order["temperature"], order["top_p"], order["top_k"]) == (0.7, 0.9, -1)
        assert (order["min_p"], order["repetition_penalty"]) == (0.0, 1.0)
        assert order["logit_bias"] == {str(row): -100 for row in range(tokenizer.vocab_size, 272)}
        assert order["stop_token_ids"] == sorted(tokenizer.eos_ids) and order["max_tokens"] == 5


def test_what_a_dead_server_left_is_asked_of_the_next_and_nothing_twice(world, model, serve, tmp_path):
    model.dies_at, path = 4, tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="no server is left, the same command goes on"):
        ask(world, path, serve(), rollout_concurrency=1)
    kept = stage0_files.answers(path)
    assert len(kept) == 4
    model.dies_at, server = None, serve()
    ask(world, path, server)
    assert len(orders(server)) == 5 and stage0_files.answers(path).items() >= kept.items()
    with pytest.raises(UserError, match=r"was sampled with temperature = 0.0, now it is 1.0"):
        ask(world, path, server, temperature=1.0)


@pytest.mark.parametrize("probes", [0, 1])
def test_the_questions_of_a_server_that_goes_are_left_to_the_others(
    world, model, serve, tmp_path, capfd, probes
):
    gone, there = serve(lambda *asked: model(*asked) if len(gone.seen) <= probes else (503, "gone")), serve()
    path = ask(world, tmp_path / "a.jsonl", there, gone, rollout_api="chat", rollout_concurrency=2)
    assert len(stage0_files.answers(path)) == 9 == len(orders(there))
    assert "1 servers go on without it" in capfd.readouterr().err


@pytest.mark.parametrize("api", ["tokens", "chat"])
def test_another_template_or_tokenizer_is_found_before_an_answer_is_kept(world, model, serve, tmp_path, api):
    model.prefix, path = "be brief ", tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"cuts a prompt into other tokens than we do .*'be brief"):
        ask(world, path, serve(), rollout_api=api)
    assert not path.exists() or not path.read_text()
    if api == "tokens":
        model.tells = False
        with pytest.raises(UserError, match=r"cuts a prompt into \d+ tokens, we into \d+"):
            ask(world, path, serve())


@pytest.mark.parametrize("strict", [False, True])
def test_texts_of_a_server_that_tells_no_tokens_are_cut_anew_in_training(
    world, model, serve, tmp_path, capfd, strict
):
    model.tells, model.strict = False, strict
    path = ask(world, tmp_path / "a.jsonl", serve(), rollout_api="chat")
    own = stage0_files.answers(stage0_files.stage0(world, tmp_path / "own.jsonl", **GREEDY))
    for key, line in stage0_files.answers(path).items():
        assert "prompt_ids" not in line and "response_ids" not in line
        assert line["messages"] == own[key]["messages"]
    assert capfd.readouterr().err.count("tells no token ids") == 1
    assert len(list(load_rollouts(path))) == 9


def test_thinking_that_a_server_tells_apart_stays_in_the_answer(world, serve, tmp_path):
    message = {"reasoning_content": "hm", "content": "4"}
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    path = ask(world, tmp_path / "a.jsonl", serve(lambda path, order: (200, reply)), rollout_api="chat")
    for line in stage0_files.answers(path).values():
        assert line["messages"][-1]["content"] == "<think>hm</think>4" and line["finish_reason"] == "stop"


def test_an_answer_whose_end_token_is_left_out_gets_it_back(world, serve, tmp_path):
    tokenizer = load_tokenizer(world.hf)
    choice = {"text": "a", "token_ids": tokenizer.encode("a"), "finish_reason": "stop"}
    path = ask(world, tmp_path / "a.jsonl", serve(lambda path, order: (200, {"choices": [choice]})))
    for line in stage0_files.answers(path).values():
        assert line["response_ids"] == [*tokenizer.encode("a"), tokenizer.eos_id]


def test_an_answer_ends_before_a_token_that_no_text_has(world, serve, tmp_path):
    ids = [*load_tokenizer(world.hf).encode("ab"), 270, 1]
    choice = {"text": "ab?", "token_ids": ids, "finish_reason": "stop"}
    path = ask(world, tmp_path / "a.jsonl", serve(lambda path, order: (200, {"choices": [choice]})))
    for line in stage0_files.answers(path).values():
        assert line["response_ids"] == ids[:2] and line["finish_reason"] == "length"


def test_a_server_that_starts_late_is_waited_for(world, serve, tmp_path, monkeypatch):
    server, tries = serve(), []
    from zeda_megatron.distill import server_pool

    def late(*args, **kwargs):
        tries.append(args)
        if len(tries) < 3:
            raise server_pool.NoAnswer("not yet")
        return openai_server(*args, **kwargs)

    openai_server = server_pool.OpenAIServer
    monkeypatch.setattr(server_pool, "OpenAIServer", late)
    ask(world, tmp_path / "a.jsonl", server, rollout_wait=60)
    assert len(tries) == 3


def test_a_server_whose_model_is_given_by_name_is_waited_for_and_its_context_is_known(
    world, serve, tmp_path, monkeypatch
):
    server, looked = serve(), []
    two_models(server)
    server.models.append({"id": "tiny", "max_model_len": 20})
    look_up = OpenAIServer.look_up

    def late(one):
        looked.append(one)
        if len(looked) < 3:
            raise NoAnswer("not yet")
        look_up(one)

    monkeypatch.setattr(OpenAIServer, "look_up", late)
    with pytest.raises(UserError, match="has a context of 20"):
        ask(world, tmp_path / "a.jsonl", server, rollout_wait=60, rollout_model="tiny")
    assert len(looked) == 3


def long_models(server):
    server.models = [{"id": "tiny", "max_model_len": 20}]


def two_models(server):
    server.models = ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            long_models,
            r"has a context of 20, prompt and answer may take \d+: vllm serve MODEL --max-model-len",
        ),
        (two_models, "serves 2 models.*--rollout-model"),
    ],
)
def test_servers_that_cannot_serve_are_told_before_the_first_answer(world, serve, tmp_path, change, message):
    server = serve()
    change(server)
    with pytest.raises(UserError, match=message):
        ask(world, tmp_path / "a.jsonl", server)


def test_mistakes_of_flags_are_named(world, serve, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"no answer.*start it: vllm serve MODEL --max-model-len \d+"):
        ask(world, path, "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="--rollout-url is missing"):
        stage0_files.stage0(world, path, rollout_engine="openai")
    with pytest.raises(UserError, match="--rollout-url is for --rollout-engine openai"):
        stage0_files.stage0(world, path, rollout_url=["http://x/v1"])
    with pytest.raises(UserError, match="--rollout-url ftp://x: an address begins with"):
        ask(world, path, "ftp://x")
    monkeypatch.setattr(stage0.torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.raises(UserError, match="asks from one process"):
        ask(world, path, serve())


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_vllm_server_gives_the_answers_of_the_model_itself(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
    model, sizes = vllm_world.MODELS["qwen"]
    world = tiny_world.make_world(tmp_path / "world", model, **sizes)
    own = stage0_files.stage0(world, tmp_path / "own.jsonl", **GREEDY)
    with vllm_world.Server(world.hf, tmp_path, ["--generation-config", "vllm"], {}) as server:
        path = ask(world, tmp_path / "served.jsonl", server)
        chat = ask(world, tmp_path / "chat.jsonl", server, rollout_api="chat")
    assert stage0_files.answers(path) == stage0_files.answers(own)
    # There nobody bans the rows of the embedding that no text has.
    same = [line == stage0_files.answers(own)[key] for key, line in stage0_files.answers(chat).items()]
    assert sum(same) > len(same) / 2
