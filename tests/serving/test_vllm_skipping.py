"""What the vLLM plugin asks of an expert kernel, and what it refuses, by name."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/serving/vllm_env.sh")
from zeda_megatron.serving.vllm import install, skipping

pytestmark = pytest.mark.vllm
N, K, H, T = 6, 3, 5, 40


def make_experts(kernel="CPUUnquantizedExperts", monolithic=False, base=None, **changes):
    """What the plugin reads of a layer's experts."""
    parallel = {"use_all2all_kernels": False, "all2all_backend": skipping.GATHERED, "enable_eplb": False}
    parallel |= {key: changes.pop(key) for key in list(changes) if key in parallel}
    moe = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(**parallel),
        is_sequence_parallel=False,
        is_lora_enabled=changes.pop("is_lora_enabled", False),
    )
    method = SimpleNamespace(
        experts_cls=type(kernel, (), {}),
        is_monolithic=monolithic,
        moe=moe,
        apply=None,
        process_weights_after_loading=None,
    )
    assert not changes
    return SimpleNamespace(quant_method=method, moe_config=moe, _expert_map=base, global_num_experts=N)


GATE = SimpleNamespace(
    routing=SimpleNamespace(num_real=N, zero=SimpleNamespace(kind="zero"), masked=False),
    weight=torch.ones(N, H),
)


@pytest.mark.parametrize(
    "base", [None, torch.tensor([-1, -1, -1, 0, 1, 2], dtype=torch.int32)], ids=["alone", "second"]
)
def test_zero_experts_are_one_more_expert_of_no_rank(base):
    """A kernel that drops what the map puts on no rank computes the real slots of its own experts, and nothing else."""
    experts = make_experts(base=base)
    skipping.skip_zero_experts(experts, GATE, anyway=False)
    assert experts.global_num_experts == len(experts._expert_map) == N + 1
    assert experts._expert_map[-1] == -1 and experts._expert_map.dtype == torch.int32
    draw = torch.Generator().manual_seed(0)
    raw_TK = torch.rand(T, 2 * N, generator=draw).topk(K).indices
    weights_TK, x_TH = torch.rand(T, K, generator=draw), torch.randn(T, H, generator=draw)
    local = experts._expert_map.tolist()
    w1 = torch.randn(max(local) + 1, H, H, generator=draw)
    seen = []

    def kernel(*, output, hidden_states, w1, topk_weights, topk_ids, global_num_experts, expert_map):
        """Stands in for vLLM's: bounds are not checked."""
        assert expert_map is None and global_num_experts == len(w1)
        assert int(topk_ids.min()) >= 0 and int(topk_ids.max()) < len(w1)
        seen.append(topk_ids.numel())
        output.copy_(torch.einsum("tk,tkho,th->to", topk_weights, w1[topk_ids.long()], hidden_states))

    ids_TK = raw_TK.masked_fill(raw_TK >= N, skipping.skipped_id(experts.moe_config.moe_parallel_config, N))
    output = torch.full((T, H), float("nan"))
    skipping._real_rows(
        kernel,
        output=output,
        hidden_states=x_TH,
        w1=w1,
        topk_weights=weights_TK,
        topk_ids=ids_TK.to(torch.int32),
        expert_map=experts._expert_map,
        global_num_experts=N + 1,
    )
    expected = torch.zeros(T, H)
    for t in range(T):
        for weight, e in zip(weights_TK[t], raw_TK[t].tolist()):
            if e < N and local[e] >= 0:
                expected[t] += weight * (x_TH[t] @ w1[local[e]])
    torch.testing.assert_close(output, expected)
    assert seen == [sum(e < N and local[e] >= 0 for row in raw_TK.tolist() for e in row)]
    assert 0 < seen[0] < T * K


def test_a_dispatch_over_a_library_knows_nobody_as_minus_one():
    parallel = SimpleNamespace(use_all2all_kernels=True, all2all_backend="deepep_high_throughput")
    assert skipping.skipped_id(parallel, N) == -1
    assert (
        skipping.skipped_id(SimpleNamespace(use_all2all_kernels=True, all2all_backend=skipping.GATHERED), N)
        == N
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"is_lora_enabled": True}, "--enable-lora"),
        (
            {"kernel": "TrtLlmBf16ExpertsMonolithic", "monolithic": True},
            "TrtLlmBf16ExpertsMonolithic routes by itself",
        ),
        (
            {"use_all2all_kernels": True, "all2all_backend": "deepep_low_latency"},
            "--all2all-backend deepep_low_latency",
        ),
        ({"kernel": "CutlassExpertsFp8"}, "the MoE kernel CutlassExpertsFp8"),
        ({"kernel": "FlashInferExperts"}, "the MoE kernel FlashInferExperts"),
        ({"kernel": "AiterExperts"}, "the MoE kernel AiterExperts"),
    ],
)
def test_what_would_not_skip_is_refused_by_name(monkeypatch, changes, told):
    monkeypatch.setattr(skipping, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(ValueError, match=told):
        skipping.skip_zero_experts(make_experts(**changes), GATE, anyway=False)


@pytest.mark.parametrize("kernel", [*skipping.SKIPPING_KERNELS, "FlashInferExperts"])
def test_kernels_that_read_an_expert_map_are_taken(monkeypatch, kernel):
    monkeypatch.setattr(skipping, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    experts = make_experts(kernel)
    skipping.skip_zero_experts(experts, GATE, anyway=kernel == "FlashInferExperts")
    assert experts.global_num_experts == N + 1


@pytest.mark.parametrize(
    ("cpu", "backend", "expected"),
    [(False, "auto", "triton"), (False, "marlin", "marlin"), (True, "auto", "auto")],
)
def test_on_a_gpu_the_kernel_that_skips_is_chosen_unless_another_was(monkeypatch, cpu, backend, expected):
    monkeypatch.setattr(install, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    config = SimpleNamespace(kernel_config=SimpleNamespace(moe_backend=backend))
    install.prefer_skipping_kernels(config)
    assert config.kernel_config.moe_backend == expected
