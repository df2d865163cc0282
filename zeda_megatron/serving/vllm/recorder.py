"""Which experts served which token, recorded in the process that vLLM runs in.

vLLM's own `enable_return_routed_experts` needs its Model Runner V2, which needs Triton; this works without.
"""

from __future__ import annotations

from functools import partial

import torch


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
