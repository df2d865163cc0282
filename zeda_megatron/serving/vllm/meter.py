"""The zero share of a running engine: counted per MoE layer, told to Prometheus and to the log."""

from __future__ import annotations

import time

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

logger = init_logger(f"vllm.plugins.{__name__}")


class SlotCounter:
    """Slots of one MoE layer since the start, on the device. Warm-up passes do not count.

    In a CUDA graph the rows that pad a batch are counted too, as the graph does not know how many they are.

    Attributes:
        counts: int64 [2]: slots that chose a zero expert, all slots.
    """

    def __init__(self):
        self.counts = torch.zeros(2, dtype=torch.int64)

    def count(self, ids_TK: torch.Tensor, num_real: int) -> None:
        """Add the picks of one pass."""
        capturing = ids_TK.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and is_forward_context_available() and get_forward_context().attn_metadata is None:
            return
        self.counts[0] += (ids_TK >= num_real).sum()
        self.counts[1] += ids_TK.numel()


class ZeroShareMeter:
    """Reads the counters of all layers now and then.

    Args:
        counters: by layer number. seconds: time between two readings; a reading waits for the device.
    """

    def __init__(self, counters: dict[int, SlotCounter], seconds: float):
        self.counters, self.seconds = counters, seconds
        self._due = time.monotonic() + seconds
        self._told = {layer: [0, 0] for layer in counters}
        self._metrics = None

    def read(self) -> dict[int, list[int]]:
        """Per layer: zero slots and all slots since the start (or the last reset)."""
        return {layer: counter.counts.tolist() for layer, counter in self.counters.items()}

    def reset(self) -> None:
        """Start counting anew (what Prometheus was told stays)."""
        for layer, counter in self.counters.items():
            counter.counts.zero_()
            self._told[layer] = [0, 0]

    def tick(self) -> None:
        """Called once a step: tells the news if it is time. Ranks with the same tokens speak once."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self.seconds
        if get_tensor_model_parallel_rank() == 0:
            self._tell(self.read())

    def _tell(self, now: dict[int, list[int]]) -> None:
        news = {layer: [a - b for a, b in zip(now[layer], self._told[layer])] for layer in now}
        self._told = now
        zero, slots = (sum(column) for column in zip(*news.values()))
        if not slots:
            return
        zero_slots, all_slots, share = self._prometheus()
        for layer, (layer_zero, layer_slots) in news.items():
            zero_slots.labels(layer=str(layer)).inc(layer_zero)
            all_slots.labels(layer=str(layer)).inc(layer_slots)
        share.set(zero / slots)
        logger.info("zero share %.1f%% of %d routed slots", 100 * zero / slots, slots)

    def _prometheus(self):
        if self._metrics is None:
            self._metrics = prometheus_metrics()
        return self._metrics


def prometheus_metrics():
    """Counters `zeda:zero_slots` and `zeda:routed_slots` by layer, gauge `zeda:zero_share` of the last reading; those
    of this process if it has them already."""
    from prometheus_client import REGISTRY, Counter, Gauge

    wanted = (
        (Counter, "zeda:zero_slots", "Routed slots that chose a zero expert.", {"labelnames": ["layer"]}),
        (Counter, "zeda:routed_slots", "Routed slots.", {"labelnames": ["layer"]}),
        (
            Gauge,
            "zeda:zero_share",
            "Zero share since the reading before.",
            {"multiprocess_mode": "mostrecent"},
        ),
    )
    known = REGISTRY._names_to_collectors
    return [known.get(name) or kind(name, text, **more) for kind, name, text, more in wanted]
