"""vLLM with the plugin gives the answers and the zero share of the files for transformers, and skips for real."""

import re
import shutil

import pytest
import vllm_world

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500), pytest.mark.usefixtures("one_process")]
OTHERS = ("glm45", "v3", "v2", "oss", "minimax", "olmoe", "qwen2")
NAMES = (
    *("qwen_shared", "qwen_paired", "glm_shared", "glm_paired", "mixtral_shared", "mixtral_paired"),
    *(f"{family}_{kind}" for family in OTHERS for kind in ("shared", "paired")),
)
KINDS = ("qwen_learned", "glm_copy", "qwen_awake", "glm_awake")
"""Zero experts that give something."""


@pytest.fixture(scope="module")
def folders(one_process, tmp_path_factory):
    return vllm_world.Folders(tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", (*NAMES, *KINDS))
def test_offline_answers_and_zero_share_are_those_of_transformers(folders, name):
    expected = vllm_world.reference(folders[name])
    assert all(0 < share < 1 for share in expected.shares)
    made = vllm_world.offline(folders[name], enable_prefix_caching=False)
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts


@pytest.mark.parametrize("name", ["next_shared", "q35_shared", "q35_paired", "seeing_shared"])
def test_gated_delta_networks_answer_in_bf16_nearly_as_in_transformers(folders, name):
    """vLLM's CPU kernels of them take no other type: tokens part where rounding decides."""
    expected = vllm_world.reference(folders[name])
    more = {"skip_tokenizer_init": False} if name.startswith("seeing") else {}  # pictures are made tokens
    made = vllm_world.offline(folders[name], enable_prefix_caching=False, dtype="bfloat16", **more)
    (answers,) = made["rounds"]
    assert [one[0] for one in answers] == [one[0] for one in expected.tokens]
    for layer, (zero, slots) in made["counts"].items():
        assert abs(zero / slots - expected.counts[layer][0] / expected.counts[layer][1]) < 0.05


TENSORS = {"tensor_parallel_size": 2}
EXPERTS = TENSORS | {"enable_expert_parallel": True}
STAGES = {"pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(
            (name, TENSORS)
            for name in (
                *("qwen_learned", "qwen_paired", "glm_copy", "glm_paired", "qwen_awake"),
                *(f"{family}_shared" for family in OTHERS),
            )
        ),
        *((name, EXPERTS) for name in ("qwen_shared", "qwen_awake", "glm_paired", "mixtral_paired")),
        *((name, STAGES) for name in ("qwen_paired", "glm_shared")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_two_ranks_give_the_same_answers(folders, name, layout):
    """What zero experts give is added once, not by every rank; a rank computes the slots of its own experts."""
    expected = vllm_world.reference(folders[name])
    made = vllm_world.offline(folders[name], enable_prefix_caching=False, **layout)
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts


@pytest.mark.parametrize("name", ["qwen_shared", "qwen_paired"])
def test_cached_prefixes_change_no_answer(folders, name):
    """The second round finds the prompts' blocks in the cache: fewer slots are computed, the answers are the same."""
    expected = vllm_world.reference(folders[name])
    made = vllm_world.offline(folders[name], rounds=2, enable_prefix_caching=True, block_size=32)
    assert made["rounds"] == [expected.tokens] * 2
    once = sum(slots for _, slots in expected.counts.values())
    assert once < sum(slots for _, slots in made["counts"].values()) < 2 * once


@pytest.mark.parametrize(
    ("name", "turn", "llm"),
    [
        ("qwen_paired", lambda m: m.set_zero_threshold(-2.5), {"hf_overrides": {"zce_threshold": -2.5}}),
        ("qwen_shared", lambda m: m.set_zero_logit_bias(0.5), {"additional_config": {"zce_logit_bias": 0.5}}),
        ("glm_paired", lambda m: m.set_zero_threshold(-2.5), {"additional_config": {"zce_threshold": -2.5}}),
        ("glm_shared", lambda m: m.set_zero_logit_bias(0.1), {"hf_overrides": {"zce_logit_bias": 0.1}}),
    ],
)
def test_the_server_s_dial_is_the_model_s(folders, name, turn, llm):
    before, expected = vllm_world.reference(folders[name]), vllm_world.reference(folders[name], turn)
    made = vllm_world.offline(folders[name], enable_prefix_caching=False, **llm)
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts
    assert sum(expected.shares) > sum(before.shares)


@pytest.mark.parametrize(
    ("name", "experts"), [("qwen_awake", True), ("glm_shared", True), ("qwen_paired", False)]
)
def test_two_data_parallel_ranks_give_the_same_answers(folders, name, experts):
    """Every rank answers half of the prompts; their MoE layers meet: all tokens go to all ranks, each of which has half
    of the experts, or a half of every expert."""
    expected = vllm_world.reference(folders[name])
    made = vllm_world.offline_of_two(
        folders[name], enable_prefix_caching=False, enable_expert_parallel=experts
    )
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts


BY_REQUEST = {
    "logits_processors": ["zeda_megatron.serving.vllm.request_dials:RequestDials"],
    "enable_prefix_caching": False,
}


@pytest.mark.parametrize("name", ["qwen_paired", "qwen_shared", "glm_awake"])
def test_every_request_has_a_dial_of_its_own(folders, name):
    """Of four requests two at a time are answered: one that ends makes room, and others move to its place."""
    dials, small = [0.7, 0.0, -0.5, 1.5], {"max_num_seqs": 2, "max_num_batched_tokens": 48}
    expected = vllm_world.reference(folders[name], turn_each=lambda m, n: m.set_zero_dials([dials[n]]))
    extra = [{"zce_dial": dial} if dial else {} for dial in dials]
    made = vllm_world.offline(folders[name], extra_args=extra, **BY_REQUEST, **small)
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts
    assert expected.tokens != vllm_world.reference(folders[name]).tokens


@pytest.mark.parametrize("name", ["next_shared", "seeing_shared"])
def test_dials_of_requests_reach_models_with_gated_delta_networks(folders, name):
    """Two requests skip all, two nothing, so that rounding in bf16 changes no count. One of the models sees."""
    extra = [{"zce_dial": dial} for dial in (50.0, -50.0, 50.0, -50.0)]
    blind = {"limit_mm_per_prompt": {"image": 0, "video": 0}} if name.startswith("seeing") else {}
    made = vllm_world.offline(folders[name], extra_args=extra, dtype="bfloat16", **BY_REQUEST, **blind)
    fed = [3 * (len(prompt) + vllm_world.NEW_TOKENS - 1) for prompt in vllm_world.prompts()]
    assert set(map(tuple, made["counts"].values())) == {(fed[0] + fed[2], sum(fed))}


def test_thinking_has_a_dial_of_its_own(folders):
    """The marks are tokens that the answers have: some begin to think, stop, and begin again."""
    plain = vllm_world.reference(folders["qwen_paired"]).tokens
    marks = [(tokens[2], tokens[9]) for tokens in plain]
    numbers = [(0.5, 2.0), (0.0, -3.0), (0.0, 1.0), (-1.0, 3.0)]

    def think(model, n):
        model.set_zero_dials(None)
        return model.zero_dial_by_phase(*marks[n], inside=numbers[n][1], outside=numbers[n][0])

    expected = vllm_world.reference(folders["qwen_paired"], turn_each=think)
    extra = [
        {"zce_dial": dial, "zce_dial_thinking": thinking, "zce_think_tokens": list(pair)}
        for (dial, thinking), pair in zip(numbers, marks)
    ]
    made = vllm_world.offline(
        folders["qwen_paired"], extra_args=extra, **BY_REQUEST, max_num_batched_tokens=48
    )
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts
    assert sum(a != b for a, b in zip(expected.tokens, plain)) >= 2


@pytest.mark.parametrize("name", ["qwen_paired", "glm_awake"])
def test_a_batch_may_prefer_the_experts_that_it_reads_anyway(folders, name):
    """One prompt at a time: the margin then weighs a token's picks against each other's, as in transformers."""
    before = vllm_world.reference(folders[name])
    expected = vllm_world.reference(folders[name], lambda model: model.set_zero_batch_margin(0.6))
    made = vllm_world.offline(
        folders[name],
        enable_prefix_caching=False,
        max_num_seqs=1,
        additional_config={"zce_batch_margin": 0.6},
    )
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts != before.counts


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["qwen_shared", "qwen_awake", "mixtral_paired"])
def test_packed_experts_answer_as_their_numbers_say(folders, tmp_path, monkeypatch, name, number_format):
    """The stock method reads the packed folder, weights and scales, into the layer; its kernel is a stand-in."""
    packed = vllm_world.packed(
        folders[name], tmp_path / "packed", number_format, ("self_attn", "layers.1.mlp")
    )
    expected = vllm_world.reference(packed)
    monkeypatch.setenv("ZEDA_TEST_8_BITS", "1")
    made = vllm_world.offline(packed, enable_prefix_caching=False)
    assert made["rounds"] == [expected.tokens]
    assert made["counts"] == expected.counts


@pytest.mark.parametrize("name", ["qwen_paired", "q35_paired"])
def test_a_packed_folder_is_served_whole(folders, tmp_path, monkeypatch, name):
    """With int8 attention as well, whose inputs vLLM's own kernel rounds: answers begin as the numbers say."""
    packed = vllm_world.packed(folders[name], tmp_path / "packed", "int8")
    expected = vllm_world.reference(packed)
    monkeypatch.setenv("ZEDA_TEST_8_BITS", "1")
    more = {"dtype": "bfloat16"} if name.startswith("q35") else {}
    (made,) = vllm_world.offline(packed, enable_prefix_caching=False, **more)["rounds"]
    assert [one[0] for one in made] == [one[0] for one in expected.tokens]


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("qwen_shared", "qwen3_moe"),
        ("qwen_shared", "qwen3_moe_plus_plus"),
        ("glm_shared", "glm4_moe_lite"),
        ("glm_shared", "glm4_moe_lite_plus_plus"),
        ("mixtral_shared", "mixtral_plus_plus"),
    ],
)
def test_folders_as_the_authors_publish_them_are_served(folders, tmp_path, name, model_type):
    folder = vllm_world.as_published(folders[name], tmp_path / name, model_type)
    expected = vllm_world.reference(folder)
    made = vllm_world.offline(folder, enable_prefix_caching=False)
    assert made["rounds"] == [expected.tokens] == [vllm_world.reference(folders[name]).tokens]
    assert made["counts"] == expected.counts
    assert all(0 < share < 1 for share in expected.shares)


def test_the_masked_model_is_the_static_one(folders, tmp_path):
    folder = tmp_path / "qwen_masked"
    shutil.copytree(folders["qwen_shared"], folder)
    vllm_world.change_config(folder, use_zce_mask=True)
    expected, made = vllm_world.reference(folder), vllm_world.offline(folder, enable_prefix_caching=False)
    assert made["rounds"] == [expected.tokens]
    assert [zero for zero, _ in made["counts"].values()] == [0, 0]


@pytest.mark.parametrize(
    ("name", "turn", "flags", "extra"),
    [
        ("qwen_shared", None, [], {}),
        (
            "qwen_paired",
            lambda m: m.set_zero_threshold(-2.5),
            ["--hf-overrides", '{"zce_threshold": -2.5}'],
            {},
        ),
        ("glm_shared", lambda m: m.set_zero_logit_bias(0.1), [], {"zce_logit_bias": 0.1}),
        ("glm_paired", None, [], {}),
        ("mixtral_paired", lambda m: m.set_zero_threshold(-2.5), [], {"zce_threshold": -2.5}),
    ],
)
def test_the_server_gives_the_same_answers_and_tells_the_zero_share(
    folders, tmp_path, name, turn, flags, extra
):
    expected = vllm_world.reference(folders[name], turn or (lambda model: None))
    with vllm_world.Server(folders[name], tmp_path, flags, extra) as server:
        answer = server.post(
            "/v1/completions",
            {
                "model": "dynamic",
                "prompt": vllm_world.prompts(),
                "max_tokens": vllm_world.NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        assert [choice["token_ids"] for choice in answer["choices"]] == expected.tokens
        # The last step's slots are told with the next step.
        server.post("/v1/completions", {"model": "dynamic", "prompt": [5], "max_tokens": 2, "temperature": 0})
        metrics = server.get("/metrics")
    told = {
        key: sum(float(v) for v in re.findall(rf"^zeda:{key}_total{{.*}} (\S+)$", metrics, re.M))
        for key in ("zero_slots", "routed_slots")
    }
    zero, slots = (sum(column) for column in zip(*expected.counts.values()))
    few = 12  # slots of the short second question
    assert slots <= told["routed_slots"] <= slots + few
    assert zero <= told["zero_slots"] <= zero + few
    (share,) = re.findall(r"^zeda:zero_share\S* (\S+)$", metrics, re.M)
    assert 0 <= float(share) <= 1 and 0 < zero < slots
    assert "zero share" in server.log.read_text()
