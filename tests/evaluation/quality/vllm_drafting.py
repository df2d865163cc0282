"""Answers with vLLM's speculative decoding, in a process of its own: a job (JSON) in, one line of JSON out.

Job: `folder`, `drafts` (folder of the head, or null: the same), `prompts` (token ids), `new_tokens`, `vocab` (ids that
may be answered), `eos` (ids).
"""

import json
import sys

from vllm import LLM, SamplingParams


def zero_slots(model):
    meter = getattr(model, "zero_share_meter", None)
    return sum(zero for zero, _ in meter.read().values()) if meter else 0


def main() -> None:
    job = json.loads(sys.stdin.read())
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    if job.get("drafts"):
        speculative["model"] = job["drafts"]
    llm = LLM(
        job["folder"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        disable_log_stats=False,
        speculative_config=speculative,
        # vLLM's rotary kernel for the CPU has other numbers than its PyTorch form, for this model.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
    )
    allowed = {"allowed_token_ids": list(range(job["vocab"])), "stop_token_ids": job["eos"]}
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], detokenize=False, **allowed)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    told = {
        "answers": [list(one.outputs[0].token_ids) for one in made],
        "drafts": counts["vllm:spec_decode_num_draft_tokens"],
        "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
        "zero_slots": llm.apply_model(zero_slots)[0],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
