"""Runs vLLM's offline engine in a process of its own, as a user would: a job (JSON) in, one line of JSON out.

Job: `folder`, `llm` (arguments of `LLM`), `prompts` (token ids), `rounds` (how often they are answered), `new_tokens`.
"""

import json
import sys

from vllm import LLM, SamplingParams


def counts(model):
    return model.zero_share_meter.read()


def main() -> None:
    job = json.loads(sys.stdin.read())
    options = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    llm = LLM(job["folder"], **(options | job["llm"]))
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    prompts, rounds = [{"prompt_token_ids": prompt} for prompt in job["prompts"]], []
    for _ in range(job["rounds"]):
        made = llm.generate(prompts, sampling, use_tqdm=False)
        rounds.append([list(one.outputs[0].token_ids) for one in made])
    print(json.dumps({"rounds": rounds, "counts": llm.apply_model(counts)[0]}))


if __name__ == "__main__":
    main()
