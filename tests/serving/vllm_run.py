"""Runs vLLM's offline engine in a process of its own, as a user would: a job (JSON) in, one line of JSON out.

Job: `folder`, `llm` (arguments of `LLM`), `prompts` (token ids), `rounds` (how often they are answered), `new_tokens`,
`extra_args` (of each prompt, or null).
"""

import json
import sys

from vllm import LLM, SamplingParams


def counts(model):
    return model.zero_share_meter.read()


def warm_up(worker):
    """A pipeline stage makes its buffers in a pass that vLLM 0.32 leaves out on a CPU in eager mode."""
    worker.model_runner._dummy_run(8)


def main() -> None:
    job = json.loads(sys.stdin.read())
    options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
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
