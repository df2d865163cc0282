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


class GatherOnCpus:
    """An extension of vLLM's workers: importing it is all."""

    gather_on_cpus()


def warm_up(worker):
    """A pipeline stage makes its buffers in a pass that vLLM 0.32 leaves out on a CPU in eager mode."""
    worker.model_runner._dummy_run(8)


def main() -> None:
    job = json.loads(sys.stdin.read())
    options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    if "VLLM_DP_RANK" in os.environ:
        options["worker_extension_cls"] = "vllm_run.GatherOnCpus"
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
