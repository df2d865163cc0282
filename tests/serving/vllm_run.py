"""Runs vLLM's offline engine in a process of its own, as a user would: a job (JSON) in, one line of JSON out.

Job: `folder`, `llm` (arguments of `LLM`), `prompts` (token ids), `rounds` (how often they are answered), `new_tokens`,
`extra_args` (of each prompt, or null).
"""

import json
import os
import sys

import torch
from vllm import LLM, SamplingParams


def counts(model):
    return model.zero_share_meter.read()


def gather_on_cpus() -> None:
    """vLLM 0.32 lacks on CPUs what data-parallel MoE layers ask of a group: all-gather and reduce-scatter of unequal
    parts. These do what its communicators of GPUs do."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(self, input_, dim=0, sizes=None):
        if isinstance(input_, (list, tuple)):
            return [all_gatherv(self, one, dim, sizes) for one in input_]
        parts = [input_.new_empty(size, *input_.shape[1:]) for size in sizes]
        for rank, part in zip(self.ranks, parts):
            if rank == self.ranks[self.rank_in_group]:
                part.copy_(input_)
            torch.distributed.broadcast(part, rank, group=self.device_group)
        return torch.cat(parts)

    def reduce_scatterv(self, input_, dim=0, sizes=None):
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=self.device_group)
        return whole.split(sizes)[self.rank_in_group]

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv


def multiply_on_cpus() -> None:
    """vLLM's 8-bit experts want AMX on a CPU. This stand-in has their contract: rows, ids of local experts alone,
    weights times scales; activations keep their type. Kernels of 8-bit attention are those of any CPU: AMX's take no
    float32, and no odd widths."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    class DequantisedExperts(mk.FusedMoEExpertsModular):
        expects_unquantized_inputs = True

        @staticmethod
        def activation_format():
            return mk.FusedMoEActivationFormat.Standard

        @staticmethod
        def is_supported_config(cls, *settings):
            return True, None

        def _supports(*settings):
            return True

        _supports_current_device = _supports_no_act_and_mul = _supports_quant_scheme = _supports
        _supports_activation = _supports_parallel_config = _supports

        def workspace_shapes(self, M, N, K, *settings):
            return (0,), (0,), (M, K)

        def finalize_weight_and_reduce_impl(self):
            return TopKWeightAndReduceNoOP()

        def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, **settings):
            assert int(topk_ids.min()) >= 0 and int(topk_ids.max()) < len(w1)
            output.zero_()
            for row, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights)):
                for e, weight in zip(ids, weights):
                    up = (w1[e].float() * self.w1_scale[e]) @ hidden_states[row].float()
                    gate, up = up.chunk(2)
                    down = (w2[e].float() * self.w2_scale[e]) @ (torch.nn.functional.silu(gate) * up)
                    output[row] += weight * down

    def kernels(backend):
        return [DequantisedExperts] if backend.name == "TRITON" else []

    int8.backend_to_kernel_cls = fp8.backend_to_kernel_cls = kernels
    torch.cpu._is_amx_tile_supported = lambda: False


class OnCpus:
    """An extension of vLLM's workers: importing it is all."""

    if "VLLM_DP_RANK" in os.environ:
        gather_on_cpus()
    if "ZEDA_TEST_8_BITS" in os.environ:
        multiply_on_cpus()


def warm_up(worker):
    """A pipeline stage makes its buffers in a pass that vLLM 0.32 leaves out on a CPU in eager mode."""
    worker.model_runner._dummy_run(8)


def main() -> None:
    job = json.loads(sys.stdin.read())
    options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    options["worker_extension_cls"] = "vllm_run.OnCpus"
    llm = LLM(job["folder"], **(options | job["llm"]))
    if "pipeline_parallel_size" in job["llm"]:
        llm.collective_rpc(warm_up)
    options = {"temperature": 0, "max_tokens": job["new_tokens"], "ignore_eos": True, "detokenize": False}
    prompts, rounds = [{"prompt_token_ids": prompt} for prompt in job["prompts"]], []
    every = job["extra_args"] or [None] * len(prompts)
    sampling = [SamplingParams(**options, extra_args=one) for one in every]
    for _ in range(job["rounds"]):
        made = llm.generate(prompts, sampling, use_tqdm=False)
        rounds.append([list(one.outputs[0].token_ids) for one in made])
    every = {layer: slots for rank in llm.apply_model(counts) for layer, slots in rank.items()}
    print(json.dumps({"rounds": rounds, "counts": dict(sorted(every.items()))}))


if __name__ == "__main__":
    main()
