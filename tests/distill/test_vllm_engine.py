"""vLLM as rollout engine: the built-in engine's greedy answers, log-probabilities and picks, by the newest weights."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_world
import torch
import vllm_world

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")

from zeda_megatron.config.generate import SamplingConfig
from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.convert.megatron_to_hf import megatron_to_hf
from zeda_megatron.distill.builtin_engine import BuiltinEngine
from zeda_megatron.distill.vllm_engine import VLLMEngine
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import read_architecture
from zeda_megatron.models.hf_config import static_config
from zeda_megatron.moe.paired import paired_modules
from zeda_megatron.moe.router_dials import set_dials, set_thresholds

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.usefixtures("one_process")]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32}
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
STOP, LONGEST, VOCAB = set(range(0, 90, 5)), 40, 90
KEPT: list = []
"""All pairs of this process: an engine that goes ends the process groups, which are Megatron's too."""
KINDS = ("shared", "paired", "static", "learned", "glm_shared", "glm_paired", "mixtral_paired")


@dataclasses.dataclass
class Pair:
    """The two engines on one model."""

    model: torch.nn.Module
    builtin: BuiltinEngine
    vllm: VLLMEngine


@pytest.fixture(scope="module", params=KINDS)
def pair(request, one_process):
    family = request.param.partition("_")[0]
    make, sizes = vllm_world.MODELS.get(family, (tiny.hf_model, SIZES))
    hf = make(**sizes)
    zero = ZeroExpertConfig(4)
    if "paired" in request.param:
        zero = ZeroExpertConfig(8, "zero", "paired", "weight+head")
    elif request.param == "learned":
        zero = ZeroExpertConfig(4, "learned")
    model = tiny.megatron_model(hf, zero)
    added = [module for name, module in model.named_modules() if name.endswith(".zero_output")]
    for i, module in enumerate([*paired_modules(model), *added]):
        tiny.draw(module, seed=i, std=0.1)
    set_thresholds(model, [-3.0])
    static = request.param == "static"
    set_dials(model, zero_mask=static)
    config = hf.config.to_dict() | {"architectures": [type(hf).__name__]}
    arch = read_architecture(static_config(config))
    builtin = BuiltinEngine(model, STOP, 0, LONGEST, VOCAB)
    KEPT.append(Pair(model, builtin, VLLMEngine([model], arch, zero, STOP, LONGEST, VOCAB, 4, static)))
    return KEPT[-1]


def draw_prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in (3, 9, 20, 39, 14, 1)]


def check_equal(pair: Pair, record: bool) -> list:
    prompts = draw_prompts()
    expected = pair.builtin.generate(prompts, GREEDY, list(range(6)), record_routing=record)
    made = pair.vllm.generate(prompts, GREEDY, list(range(6)), record_routing=record)
    assert [one.response_ids for one in made] == [one.response_ids for one in expected]
    assert [one.finish_reason for one in made] == [one.finish_reason for one in expected]
    for one, other in zip(made, expected):
        tiny.close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)
        if record:
            picks, wanted = one.routed_experts_TLK, other.routed_experts_TLK
            assert picks.dtype == wanted.dtype
            assert torch.equal(picks.sort(-1).values, wanted.sort(-1).values)
    return made


def test_greedy_answers_scores_and_picks_are_the_builtin_engine_s(pair):
    static = pair.vllm.static
    made = check_equal(pair, record=not static)
    assert {one.finish_reason for one in made} == {"stop", "length"}
    if not static:
        picks = torch.cat([one.routed_experts_TLK for one in made])
        assert 0 < (picks >= 8).float().mean() < 1


def test_answers_follow_the_weights_and_the_threshold(pair):
    if pair.vllm.static:
        pytest.skip("a static teacher does not move")
    before = check_equal(pair, record=False)
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    set_thresholds(pair.model, [-2.5])
    after = check_equal(pair, record=True)
    assert [one.response_ids for one in before] != [one.response_ids for one in after]


def test_sampled_answers_depend_on_seed_and_stream_alone(pair):
    prompts, sampling = draw_prompts()[:3], SamplingConfig(max_new_tokens=8, temperature=0.8)
    state = torch.get_rng_state()
    whole = pair.vllm.generate(prompts, sampling, [7, 8, 9])
    assert torch.equal(torch.get_rng_state(), state)
    alone = pair.vllm.generate(prompts[1:2], sampling, [8])
    assert alone[0].response_ids == whole[1].response_ids
    other = pair.vllm.generate(prompts, dataclasses.replace(sampling, seed=5), [7, 8, 9])
    assert [one.response_ids for one in other] != [one.response_ids for one in whole]
    assert all(token < VOCAB for one in whole + other for token in one.response_ids)


def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(pair):
    """Against the model's own logits; a nucleus that holds the likeliest token alone makes it certain."""
    prompts = draw_prompts()[:3]
    for temperature in (0.7, 2.0):
        made = pair.vllm.generate(prompts, SamplingConfig(1, temperature), [1, 2, 3])
        for prompt, one in zip(prompts, made, strict=True):
            with torch.no_grad():
                tokens, places = torch.tensor([prompt]), torch.arange(len(prompt))[None]
                logits = pair.model(tokens, places, None)[0, -1, :VOCAB]
            expected = (logits / temperature).log_softmax(-1)[one.response_ids[0]]
            assert one.logprobs[0] == pytest.approx(float(expected), abs=1e-4)
    narrow = pair.vllm.generate(prompts, SamplingConfig(4, top_p=1e-4), [1, 2, 3])
    assert all(abs(logp) < 1e-6 for one in narrow for logp in one.logprobs)
    with pytest.raises(UserError, match=r"--temperature 3\.0: vLLM takes 2\.0 at most"):
        pair.vllm.generate(prompts, SamplingConfig(1, 3.0), [1, 2, 3])


def test_a_student_without_zero_experts_is_refused():
    hf = tiny.hf_model(**SIZES)
    model = tiny.megatron_model(hf)
    arch = read_architecture(hf.config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]})
    with pytest.raises(UserError, match="--rollout-engine vllm wants a student with zero experts"):
        VLLMEngine([model], arch, ZeroExpertConfig(), STOP, LONGEST, VOCAB, 4)


@pytest.fixture(scope="module")
def small_world(one_process, tmp_path_factory):
    return tiny_world.make_world(tmp_path_factory.mktemp("world"), **SIZES)


def command_of(*flags: object, processes: int = 1) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "zeda_megatron", "train"]
    return [*command, "--no-progress", *map(str, flags)]


def run_main(*flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    command = command_of(*flags, processes=processes)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_stage_0_answers_with_vllm_and_goes_on_where_it_stopped(small_world, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    flags = ["--stage", 0, "--pretrained-checkpoint", small_world.dynamic, "--data-path", small_world.prompts]
    flags += ["--rollout-path", path, "--max-new-tokens", 8, "--rollout-engine", "vllm"]
    run_main(*flags)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 9
    assert all(0 < len(line["response_ids"]) <= 8 for line in lines)
    assert "0 answers now, 9 in all" in run_main(*flags).stdout


def stage_2_flags(world, engine=("--rollout-engine", "vllm", "--routing-replay")):
    words = ["--stage", 2, "--pretrained-checkpoint", world.dynamic, "--teacher-load", world.static]
    words += ["--data-path", world.prompts, "--seq-length", 128, "--global-batch-size", 4, "--lr", 1e-2]
    words += [
        "--max-new-tokens",
        12,
        "--train-iters",
        3,
        "--samples-per-prompt",
        2,
        "--loss-chunk-tokens",
        32,
    ]
    return [*words, *engine]


def test_stage_2_runs_with_vllm_and_a_resumed_run_is_the_uninterrupted_one(small_world, tmp_path):
    world = small_world
    flags = stage_2_flags(world)
    run_main(*flags, "--save", tmp_path / "whole")
    run_main(*flags, "--save", tmp_path / "parts", "--exit-interval", 2)
    run_main(*flags, "--save", tmp_path / "parts", "--load", tmp_path / "parts")
    whole, parts = (read(tmp_path / name) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    assert len(whole) == 3
    assert parts == whole
    assert all(abs(line["logp_gap"]) < 1e-4 for line in whole)


def test_killed_in_a_round_a_run_goes_on_and_asks_for_no_answer_twice(small_world, tmp_path):
    flags = [*stage_2_flags(small_world, ("--rollout-engine", "vllm")), "--save-interval", 2]
    run_main(*flags, "--save", tmp_path / "whole")
    answers = tmp_path / "parts" / "rollout_answers.jsonl"
    killed = subprocess.Popen(command_of(*flags, "--save", tmp_path / "parts"), stderr=subprocess.DEVNULL)
    # The checkpoint is of step 2; step 3's answers are there, it itself is not.
    while not (answers.exists() and answers.read_text().count('"version":2') == 4):
        assert killed.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    there = [line for line in answers.read_text().split() if '"version":2' in line]
    run_main(*flags, "--save", tmp_path / "parts", "--load", tmp_path / "parts")
    whole, parts = (read(tmp_path / name) for name in ("whole", "parts"))
    assert parts == whole and len(whole) == 3
    assert [line for line in answers.read_text().split() if '"version":2' in line] == there


def test_stage_2_of_a_paired_glm_runs_with_vllm(one_process, tmp_path):
    """Its policy's log-probabilities are those that vLLM sampled with: the weights and thresholds have arrived."""
    name, sizes = vllm_world.MODELS["glm"]
    world = tiny_world.make_world(tmp_path / "world", name, **sizes)
    flags = ["--stage", 2, "--pretrained-checkpoint", world.static, "--teacher-load", world.static]
    flags += ["--zero-expert-routing", "paired", "--target-zero-share", 0.4]
    flags += ["--moe-router-load-balancing-type", "none"]
    flags += ["--data-path", world.prompts, "--seq-length", 128, "--global-batch-size", 4, "--lr", 1e-2]
    flags += ["--max-new-tokens", 12, "--train-iters", 3, "--rollout-engine", "vllm"]
    run_main(*flags, "--loss-chunk-tokens", 32, "--routing-replay", "--save", tmp_path / "save")
    lines = read(tmp_path / "save")
    assert len(lines) == 3
    assert all(abs(line["logp_gap"]) < 1e-4 for line in lines)
    assert 0 < lines[-1]["zero_share"] < 1


WIDE = {"moe_intermediate_size": 64, "intermediate_size": 192}
"""Half of an expert is still as wide as the CPU kernel wants it."""
LAYOUTS = {
    "dp2": (2, []),
    "ep2": (2, ["--expert-model-parallel-size", 2]),
    "tp2 on one engine": (2, ["--tensor-model-parallel-size", 2, "--rollout-tensor-parallel-size", 2]),
    "pp2 on one engine": (2, ["--pipeline-model-parallel-size", 2, "--rollout-tensor-parallel-size", 2]),
    "tp2 ep2 dp2 on two engines": (
        4,
        [
            *("--tensor-model-parallel-size", 2, "--expert-model-parallel-size", 2),
            *("--rollout-tensor-parallel-size", 2),
        ],
    ),
}
"""Processes, and flags of student and engines."""


@pytest.fixture(scope="module")
def wide_world(one_process, tmp_path_factory):
    return tiny_world.make_world(tmp_path_factory.mktemp("wide"), **SIZES | WIDE)


def stage_2(world, folder, processes, *flags):
    run_main(*stage_2_flags(world), "--save", folder, *flags, processes=processes)
    return read(folder)


@pytest.fixture(scope="module")
def steps_of_one_process(wide_world, tmp_path_factory):
    return stage_2(wide_world, tmp_path_factory.mktemp("one") / "save", 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_stage_2_under_torchrun_takes_the_steps_of_one_process(
    wide_world, steps_of_one_process, tmp_path, name
):
    processes, flags = LAYOUTS[name]
    steps = stage_2(wide_world, tmp_path / "save", processes, *flags)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line, expected in zip(steps, steps_of_one_process):
        assert abs(line["logp_gap"]) < 1e-4, "other weights or picks than those that train"
        assert line["response_length"] == expected["response_length"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_server_that_follows_the_student_gives_the_steps_of_one_process(
    wide_world, steps_of_one_process, tmp_path, monkeypatch, ahead
):
    """A real server, and two processes that train."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    megatron_to_hf(wide_world.dynamic, wide_world.hf, tmp_path / "export")
    flags = ["--weight-transfer-config", '{"backend": "zeda_folder"}', "--enable-scale-out"]
    flags += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    with vllm_world.Server(tmp_path / "export", tmp_path, flags, {}) as server:
        engine = ["--rollout-engine", "openai", "--rollout-url", server.url, "--rollout-ahead", ahead]
        command = [*stage_2_flags(wide_world, engine), "--expert-model-parallel-size", 2]
        run_main(*command, "--save", tmp_path / "save", processes=2)
    steps = read(tmp_path / "save")
    assert [line["rollout_lag"] for line in steps] == [0, ahead, ahead]
    for line, expected in list(zip(steps, steps_of_one_process))[: 1 if ahead else 3]:
        assert abs(line["logp_gap"]) < 1e-4
        assert line["response_length"] == expected["response_length"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)


def test_stage_0_in_several_processes_is_refused(small_world, tmp_path):
    flags = ["--stage", 0, "--pretrained-checkpoint", small_world.dynamic, "--data-path", small_world.prompts]
    flags += ["--rollout-path", tmp_path / "a.jsonl", "--rollout-engine", "vllm"]
    with pytest.raises(AssertionError, match="vllm answers stage 0 in one process: use servers"):
        run_main(*flags, processes=2)


def read(folder: Path) -> list[dict]:
    return tiny_world.read_metrics(folder)
