"""Generation with vLLM in the training's processes, on the weights of the Megatron model beside it.

Neighbouring processes make up one engine (vLLM's external launcher: all of them schedule the same prompts), and every
engine answers prompts of its own. Weights go to it under their Hugging Face names, whatever layout trains them. Routed
experts are recorded here: vLLM's own `enable_return_routed_experts` needs its Model Runner V2, which needs Triton.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from ..config.generate import SamplingConfig
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from ..models.hf_config import dynamic_config, static_config, write_config
from ..models.live_weights import LiveWeights, write_weights
from ..moe.router_dials import has_pick_rule
from ..runtime.agreement import rank, world_size
from .answers import Deal, Generation, check_prompts

GPU_SHARE = 0.4
"""Share of a GPU's memory that vLLM may take: the rest is the training's."""

HOTTEST = 2.0
"""vLLM's highest temperature."""


def check_student(engine: str, chunks: list[torch.nn.Module], zero: ZeroExpertConfig | None) -> None:
    """Raise `UserError` for a student that vLLM cannot follow. `zero`: its zero experts; None: they are masked."""
    if zero is not None and not zero.num_zero_experts:
        raise UserError(f"--rollout-engine {engine} wants a student with zero experts: use builtin")
    if has_pick_rule(chunks):
        raise UserError(f"--rollout-engine {engine} does not know --moe-pick-rule: use builtin")


def check_temperature(sampling: SamplingConfig) -> None:
    """Raise `UserError` for one that vLLM does not take."""
    if sampling.temperature > HOTTEST:
        raise UserError(f"--temperature {sampling.temperature}: vLLM takes {HOTTEST} at most; use builtin")


def sampling_fields(sampling: SamplingConfig, stream_id: int, most: int, stop_ids: list[int]) -> dict:
    """Fields of vLLM's SamplingParams for one answer of `most` tokens, told with the log-probability of every one."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed_of(stream_id),
        "max_tokens": most,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # the tokenizer of the run says what ends an answer
        "logprobs": 0,
        "detokenize": False,
    }


class VLLMEngine:
    """Answers prompts with vLLM; a `RolloutEngine`.

    vLLM gets the model's config as a folder, and no weights: they are handed over, by name and in memory, before every
    `generate`. A static model's do not change and lie in the folder: on the CPU, vLLM 0.32 spoils the experts of its
    own classes when they are loaded a second time.

    Args:
        chunks: bare model chunks of this rank.
        zero: its zero experts.
        static: answer with the static model inside it, whose weights do not change (stage 0).
        stop_ids, max_length, vocab_size, slots: as for `BuiltinEngine`.
        ranks: processes of one engine, tensor-parallel.

    Raises:
        UserError: a number of processes that engines do not divide, a student without zero experts, or a pick rule.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        arch: Architecture,
        zero: ZeroExpertConfig,
        stop_ids: set[int],
        max_length: int,
        vocab_size: int,
        slots: int,
        static: bool = False,
        ranks: int = 1,
    ):
        if world_size() % ranks:
            raise UserError(
                f"--rollout-tensor-parallel-size {ranks} does not divide the {world_size()} processes of this run"
            )
        if static and world_size() > 1:
            raise UserError(
                "--rollout-engine vllm answers stage 0 in one process: use servers (--rollout-engine openai) or builtin"
            )
        check_student("vllm", chunks, None if static else zero)
        self.arch, self.static, self.deal = arch, static, Deal.of_groups(ranks)
        self.stop_ids, self.max_length, self.vocab_size = stop_ids, max_length, vocab_size
        self.weights = LiveWeights(chunks, arch)
        config = static_config(arch.hf) if static else dynamic_config(arch.hf, zero, self.weights.settings())
        dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
        self._folder = tempfile.TemporaryDirectory(prefix="zeda-vllm-")
        with torch.random.fork_rng():  # vLLM seeds the generators that training draws from
            self._write(Path(self._folder.name), config, dtype)
            latent = chunks[0].config.multi_latent_attention
            self.llm = _start(self._folder.name, static, dtype, latent, max_length, slots, ranks)
        self.sleeps = torch.cuda.is_available() and not static
        if self.sleeps:
            self.llm.sleep(level=2)
        self.recorder = None if static else RoutingRecorder(self.llm)

    def _write(self, folder: Path, config: dict, dtype: str) -> None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = config | {key: dtype}
        if "num_nextn_predict_layers" in config:
            config["num_nextn_predict_layers"] = 0  # they do not answer, and the Megatron model has none
        write_config(folder, config)
        if self.static:
            write_weights(self.weights.tensors(static=True), folder)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        stream_ids: list[int],
        record_routing: bool = False,
    ) -> list[Generation]:
        """Answer prompts (lists of token ids, each shorter than `max_length`); see `RolloutEngine`."""
        check_prompts(prompts, self.max_length)
        check_temperature(sampling)
        if record_routing and self.recorder is None:
            raise ValueError("a static model's routing is not recorded")
        with torch.random.fork_rng(), self._awake():
            self._hand_over_weights()
            if not prompts:
                return []
            if record_routing:
                self.recorder.start()
            made = self.llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [self._sampling(sampling, len(p), s) for p, s in zip(prompts, stream_ids, strict=True)],
                use_tqdm=False,
            )
        picks = self.recorder.stop() if record_routing else {}
        return [self._generation(one, picks) for one in made]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """While a student trains, an engine on its GPU keeps neither weights nor the cache of keys and values."""
        if self.sleeps:
            self.llm.wake_up()
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)

    def _hand_over_weights(self) -> None:
        if self.static:
            return
        weights = self.weights.tensors()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        for _ in weights:  # what vLLM has no use for the other ranks send all the same
            pass
        thresholds = self.weights.settings().get("zce_threshold")
        if thresholds is not None:
            from ..serving.vllm.install import set_dials

            self.llm.apply_model(lambda model: set_dials(model, thresholds))

    def _sampling(self, sampling: SamplingConfig, prompt_tokens: int, stream_id: int):
        from vllm import SamplingParams

        whole = self.vocab_size >= self.arch.vocab_size
        most = min(sampling.max_new_tokens, self.max_length - prompt_tokens)
        return SamplingParams(
            **sampling_fields(sampling, stream_id, most, sorted(self.stop_ids)),
            allowed_token_ids=None if whole else list(range(self.vocab_size)),
        )

    def _generation(self, made, picks: dict[str, torch.Tensor]) -> Generation:
        answer = made.outputs[0]
        tokens = list(answer.token_ids)
        logprobs = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
        # Ids from the vocabulary's end on are never allowed, so there is no other reason.
        reason = "stop" if answer.finish_reason == "stop" else "length"
        return Generation(tokens, logprobs, reason, picks.get(made.request_id))


def _start(folder: str, static: bool, dtype: str, latent: bool, max_length: int, slots: int, ranks: int):
    # In this process, so that weights can be handed over as tensors; and the training's threads stay where they are.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    gpu = torch.cuda.is_available()
    # Latent attention: where a processor has AMX vLLM 0.32 would take a backend that knows no float32.
    attention = "CPU_MLA" if latent and dtype == "float32" and not gpu else None
    place = {"RANK": rank(), "LOCAL_RANK": torch.cuda.current_device() if gpu else 0}
    with patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        return LLM(
            folder,
            dtype=dtype,
            attention_backend=attention,
            skip_tokenizer_init=True,
            load_format="auto" if static else "dummy",  # what is handed over is not read
            max_model_len=max_length,
            max_num_seqs=slots,
            tensor_parallel_size=ranks,
            distributed_executor_backend="external_launcher",
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            enable_prefix_caching=False,  # its blocks would outlive the weights they were computed with
            enforce_eager=not gpu,
            gpu_memory_utilization=GPU_SHARE,
            enable_sleep_mode=gpu,
        )


class RoutingRecorder:
    """Picks of all tokens that are fed to the model between `start` and `stop`.

    Args:
        llm: an offline engine whose model runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), without tensor
            parallelism, in eager mode: a captured graph calls no Python.
    """

    def __init__(self, llm):
        core = llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.config = llm.llm_engine.model_config.hf_text_config
        self._picks: dict[str, list[torch.Tensor]] = {}
        self._pass: torch.Tensor | None = None

    def start(self) -> None:
        """Record from now on."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        runners = [m for m in self.runner.get_model().modules() if isinstance(m, MoERunner)]
        self._picks, self._routers = {}, {runner.layer_id: runner.router for runner in runners}
        for layer, router in self._routers.items():
            router.set_capture_fn(partial(self._keep, layer))

    def stop(self) -> dict[str, torch.Tensor]:
        """Per request id: int16 [T, L, K], ids in [0, N+Nz), -1 in layers without experts. T counts the prompt and the
        answer without its last token, which is never fed."""
        self._close_pass()
        for router in self._routers.values():
            router.set_capture_fn(None)
        # Inside, vLLM adds something of its own to the id that the caller sees.
        return {name.rpartition("-")[0] or name: torch.cat(parts) for name, parts in self._picks.items()}

    def _keep(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Called by each layer's router in each pass; the first layer begins a pass."""
        if layer == min(self._routers):
            self._close_pass()
            shape = (ids_TK.shape[0], self.config.num_hidden_layers, ids_TK.shape[1])
            self._pass = torch.full(shape, -1, dtype=torch.int16)
            batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
            self._rows = [(name, int(starts[i]), int(starts[i + 1])) for i, name in enumerate(batch.req_ids)]
        self._pass[:, layer] = ids_TK.to("cpu", torch.int16)

    def _close_pass(self) -> None:
        if self._pass is None:
            return
        for name, begin, end in self._rows:
            self._picks.setdefault(name, []).append(self._pass[begin:end])
        self._pass = None
