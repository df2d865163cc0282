"""Speed of whole models in vLLM at a forced zero share: the static model, ours, and zero slots with weight 0.

python -m tools.measure.engine --hf examples/qwen3_30b_a3b

Real layer geometry, random weights, few layers, and a vocabulary cut in the same proportion, so that embedding and head
weigh what they weigh in the whole model. What is timed are steps of the engine, scheduler and sampling included: the
first reads all prompts (prefill), the others make a token each (decode). One engine does all: `static` hands every slot
to vLLM's kernel as stock vLLM does, `weight 0` as engines do that know no zero experts (a zero slot is one of expert 0
with weight 0). The ways take turns; a cell is the ratio to the static way of the fastest passes, and the smallest and
largest ratio of one turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from zeda_megatron.config.zero_experts import ZeroExpertConfig
from zeda_megatron.durable_file import write_result
from zeda_megatron.errors import UserError
from zeda_megatron.models.hf_config import dynamic_config, write_config
from zeda_megatron.runtime.worker import run_worker
from zeda_megatron.strict_json import read_json
from zeda_megatron.text_table import markdown_table

WAYS = ("static", "skip", "weight 0")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf", type=Path, required=True, help="HF folder; its config.json is enough")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers to build")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75], help="zero shares")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=4, help="decoding steps that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="timed turns; one more warms up")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    for flag in ("layers", "prompt", "new_tokens", "repeats"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    if not all(0 <= share <= 1 for share in options.shares) or min(options.batches) < 1:
        raise UserError("--shares must lie between 0 and 1, --batches must be at least 1")
    return options


class Contest:
    """One engine whose MoE layers take the slots that a way and a share say."""

    def __init__(self, options: argparse.Namespace):
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"vLLM cannot be imported ({error}): bash tests/serving/vllm_env.sh") from None
        config = read_json(options.hf / "config.json")
        whole, tokens = config["num_hidden_layers"], config["vocab_size"]
        config |= {
            "num_hidden_layers": options.layers,
            "vocab_size": max(tokens * options.layers // whole, 1024),
        }
        config = {key: value for key, value in config.items() if key != "mlp_layer_types"}
        with tempfile.TemporaryDirectory() as folder:
            zero = ZeroExpertConfig(num_zero_experts=8)
            write_config(Path(folder), dynamic_config(config, zero))
            self.llm = LLM(
                folder,
                dtype=options.dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_prefix_caching=False,
                max_num_seqs=max(options.batches),
                max_model_len=options.prompt + options.new_tokens + 8,
                max_num_batched_tokens=max(options.batches) * options.prompt + 8,
            )
        self.vocabulary = config["vocab_size"]
        self.llm.apply_model(self._take_over)

    def _take_over(self, model) -> None:
        self.layers = [module for module in model.modules() if type(module).__name__ == "MoERunner"]
        if not self.layers:
            raise UserError("--layers: the model has no MoE layer; take more")
        self.kernels = [layer._quant_method.moe_kernel.fused_experts for layer in self.layers]
        self.applied = [kernel.apply for kernel in self.kernels]

    def set(self, way: str, share: float) -> None:
        """From now on every MoE layer routes as asked."""
        for number, (layer, kernel) in enumerate(zip(self.layers, self.kernels)):
            layer.router._compute_routing = Forced(layer.router, way, share, number)
            # what our `apply` goes before is the kernel's own
            kernel.apply = self.applied[number] if way == "skip" else self.applied[number].args[0]


class Forced:
    """Picks of one layer: K of N drawn experts, of which a share is zero experts; the same for every way."""

    def __init__(self, router, way: str, share: float, seed: int):
        self.router, self.way, self.share, self.seed = router, way, share, seed
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        tokens = len(router_logits)
        if tokens not in self._made:
            self._made[tokens] = self._draw(tokens)
        return self._made[tokens]

    def _draw(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        real, top_k = self.router.routing.num_real, self.router.routing.top_k
        draw = torch.Generator().manual_seed(self.seed)
        ids_TK = torch.rand(tokens, real, generator=draw).topk(top_k).indices
        zero_TK = torch.rand(tokens, top_k, generator=draw) < self.share
        weights_TK = torch.full((tokens, top_k), 1 / top_k)
        if self.way == "weight 0":
            weights_TK, ids_TK = weights_TK.masked_fill(zero_TK, 0), ids_TK.masked_fill(zero_TK, 0)
        elif self.way == "skip":
            ids_TK = ids_TK.masked_fill(zero_TK, real)
        return weights_TK, ids_TK.to(torch.int32)


def measure(contest: Contest, options: argparse.Namespace) -> list[dict]:
    """One dict per phase, batch, way and share: seconds of every turn, and their ratios to the static way's."""
    arms = [("static", 0.0), *(("skip", share) for share in options.shares)]
    arms += [
        ("weight 0", share) for share in options.shares if share
    ]  # without zero slots it is the static way
    rows = []
    for batch in options.batches:
        seconds: dict = {}
        for turn in range(options.repeats + 1):
            for arm in arms:
                contest.set(*arm)
                prefill, *decode = _steps(contest, batch, options.prompt, 1 + options.new_tokens)
                if turn:  # the first turn warms up
                    seconds.setdefault(("prefill", arm), []).append(prefill)
                    seconds.setdefault(("decode", arm), []).append(min(decode))
        for (phase, (way, share)), found in seconds.items():
            static = seconds[phase, arms[0]]
            each = [one / other for one, other in zip(found, static)]
            row = {"phase": phase, "batch": batch, "way": way, "share": share, "seconds": found}
            rows.append(row | {"ratio": min(found) / min(static), "least": min(each), "most": max(each)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _steps(contest: Contest, batch: int, prompt: int, new_tokens: int) -> list[float]:
    """CPU time of every step until all are answered; one thread on an idle machine takes as long."""
    from vllm import SamplingParams

    draw = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(1, contest.vocabulary, (batch, prompt), generator=draw).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    engine, seconds = contest.llm.llm_engine, []
    for number, ids in enumerate(ids_BS):
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        before = time.process_time()
        engine.step()
        seconds.append(time.process_time() - before)
    if len(seconds) != new_tokens:
        raise RuntimeError(f"{len(seconds)} steps for {new_tokens} tokens: vLLM cut the prompts up")
    return seconds


def table(rows: list[dict], prompt: int) -> list[str]:
    """Markdown lines: a phase and batch per line."""
    shares = sorted({row["share"] for row in rows if row["way"] != "static"})
    arms = [(way, share) for way in WAYS[1:] for share in shares if share or way == "skip"]
    heads, lines = [f"{way}, z={share:g}" for way, share in arms], []
    found = {(r["phase"], r["batch"], r["way"], r["share"]): r for r in rows}
    for phase in ("prefill", "decode"):
        for batch in dict.fromkeys(row["batch"] for row in rows):
            static = min(found[phase, batch, "static", 0.0]["seconds"]) * 1e3
            name = f"prefill, {batch} x {prompt} tokens" if phase == "prefill" else f"decode, batch {batch}"
            cells = [found[phase, batch, *arm] for arm in arms]
            told = [f"{cell['ratio']:.2f} ({cell['least']:.2f}–{cell['most']:.2f})" for cell in cells]
            lines.append([name, f"{static:.0f} ms", *told])
    return markdown_table(["pass", "static", *heads], lines)


def main() -> int:
    """Command line of python -m tools.measure.engine."""
    options = parse()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    rows = measure(Contest(options), options)
    if options.json:
        write_result("--json", options.json, json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows, options.prompt)))
    return 0


if __name__ == "__main__":
    run_worker(main)
