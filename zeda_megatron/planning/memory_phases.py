"""Bytes that each phase of a step adds on one GPU: answers, the teacher's pass, the student's pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.options import Options
from ..config.zero_experts import ZeroExpertConfig
from ..models.architecture import Architecture
from .memory_activations import ExpertLoad, Layer, kept_per_layer
from .memory_parameters import StageParameters

CACHE_SLACK = 64
"""Columns that the engine's cache has more than the longest answer needs."""
SCORES = {"ce": 2, "jsd": 5}
"""Float32 tensors of a chunk's size [C, V] alive at once in the loss; 4 for the other kinds with a teacher."""


@dataclass(frozen=True)
class Shapes:
    """What one rank of one stage works on."""

    layer: Layer
    """Sizes of a layer."""
    count: StageParameters
    """Its parameters."""
    tokens: float
    """Tokens of a row on this rank where sequences are split (TP x CP)."""
    load: ExpertLoad
    """Rows of a MoE layer."""
    microbatches: int
    """Rows (micro-batches) of a step on this data-parallel rank, at most."""
    in_flight: float
    """Micro-batches whose activations are alive at once on this stage (virtual stages: as a fraction)."""
    replicas: int
    """Data-parallel ranks."""
    worst: bool
    """Experts at their worst load."""
    zero_share: float
    """Share of zero picks."""
    vocabulary: int
    """V of the whole model."""
    longest: int
    """Most positions that the model was made for."""

    @classmethod
    def of(
        cls,
        options: Options,
        arch: Architecture,
        zero: ZeroExpertConfig,
        count: StageParameters,
        stage: int,
        replicas: int,
        zero_share: float,
        worst: bool,
    ) -> Shapes:
        parallel = options.parallel
        layer = Layer.of(arch, parallel, zero, 2 if options.model.bf16 else 4)
        tokens = options.data.seq_length / (
            parallel.context_parallel_size * parallel.tensor_model_parallel_size
        )
        # In stage 2 rows are known only when answers are: at most one for each.
        microbatches = math.ceil(options.optimizer.global_batch_size / replicas)
        stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        in_flight = min(stages - stage, microbatches)
        if virtual > 1:
            chunks = 2 * (stages - stage - 1) + (virtual - 1) * stages + 1
            in_flight = min(chunks, microbatches * virtual) / virtual
        return cls(
            layer=layer,
            count=count,
            tokens=tokens,
            load=layer.load(tokens, zero_share, worst),
            microbatches=microbatches,
            in_flight=in_flight,
            replicas=replicas,
            worst=worst,
            zero_share=zero_share,
            vocabulary=arch.vocab_size,
            longest=arch.max_position_embeddings,
        )

    @property
    def hidden_bytes(self) -> float:
        """Bytes of hidden states of one row on this rank."""
        return self.tokens * self.layer.hidden * self.layer.width

    @property
    def is_last(self) -> bool:
        return self.count.head > 0

    def busiest(self, tokens: float, load: ExpertLoad) -> float:
        """Bytes of the largest layer while it runs."""
        sparse = self.layer.moe(tokens, load) if self.count.moe_layers else 0.0
        dense = self.layer.dense_mlp(tokens) if self.count.moe_layers < self.count.layers else 0.0
        return self.layer.attention(tokens) + max(sparse, dense)


def student_pass(options: Options, shapes: Shapes) -> dict[str, float]:
    """Forward and backward passes of the student, loss included."""
    layer, count, recompute = shapes.layer, shapes.count, options.model.recompute_granularity
    dense = count.layers - count.moe_layers
    kept = sum(
        number * kept_per_layer(layer, recompute, shapes.tokens, shapes.load, sparse)
        for number, sparse in ((count.moe_layers, True), (dense, False))
    )
    at_work = layer.gradients(shapes.tokens, shapes.load) + layer.width * count.largest_layer
    if recompute == "full":
        at_work += shapes.busiest(shapes.tokens, shapes.load)
    elif recompute == "selective" and count.moe_layers:
        at_work += layer.moe(shapes.tokens, shapes.load)
    dispatch = layer.dispatch(shapes.load) if count.moe_layers else 0.0
    loss = loss_bytes(options, shapes) if shapes.is_last else 0.0
    made = {"activations kept": kept * shapes.in_flight}
    if options.model.stage in ("1", "2"):
        made["teacher's hidden states"] = _teacher_hidden(options, shapes)
    if loss > at_work + dispatch:  # the last layer has ended when the loss begins
        return made | {"one layer at work": 0.0, "dispatch buffers": 0.0, "loss": loss}
    return made | {"one layer at work": at_work, "dispatch buffers": dispatch, "loss": 0.0}


def teacher_pass(options: Options, shapes: Shapes) -> dict[str, float]:
    """The teacher's forward pass; alongside the student's, what the student keeps is there too."""
    made = {}
    if options.distill.teacher_memory == "offload":
        made["teacher's weights, fetched"] = float(shapes.layer.width * shapes.count.total)
    if options.distill.teacher_schedule == "alongside":
        made["activations kept"] = student_pass(options, shapes)["activations kept"]
    made["teacher's hidden states"] = _teacher_hidden(options, shapes)
    load = shapes.layer.load(shapes.tokens, worst=shapes.worst)  # it computes every pick
    made["one layer at work"] = shapes.busiest(shapes.tokens, load)
    made["dispatch buffers"] = shapes.layer.dispatch(load) if shapes.count.moe_layers else 0.0
    return made


def answers(options: Options, shapes: Shapes, prompt_tokens: int) -> dict[str, float]:
    """Keys and values of the answers under way, and the prefill of their prompts."""
    generate, layer = options.generate, shapes.layer
    ranks, longest = shapes.replicas * options.parallel.context_parallel_size, shapes.longest
    rows = generate.generate_batch_size
    if options.model.stage == "2":
        prompts = generate.rollout_batch_size * generate.samples_per_prompt
        rows = min(rows, math.ceil((prompts or options.optimizer.global_batch_size) / ranks))
        longest = min(longest, options.data.seq_length)
    columns = min(prompt_tokens + generate.max_new_tokens, longest) + CACHE_SLACK
    cache = rows * columns * layer.cache()
    # While answering, nothing splits sequences; ranks of one tensor-parallel group send the same rows.
    tokens = rows * min(prompt_tokens, longest)
    load = layer.load(tokens, worst=shapes.worst)
    head = rows * shapes.vocabulary * (layer.width + 12) if shapes.is_last else 0.0
    split = tokens / options.parallel.tensor_model_parallel_size
    return {
        "keys and values": cache * shapes.count.layers,
        # Prefills wait in a cache of their own; decoding rotates all keys of a layer.
        "one layer at work": max(shapes.busiest(split, load), 3 * cache) + head,
        "prefill's cache": tokens * layer.cache() * shapes.count.layers,
        "dispatch buffers": layer.dispatch(load) if shapes.count.moe_layers else 0.0,
    }


def _teacher_hidden(options: Options, shapes: Shapes) -> float:
    if not shapes.is_last:
        return 0.0
    return shapes.hidden_bytes * (shapes.microbatches if options.distill.teacher_schedule == "ahead" else 1)


def loss_bytes(options: Options, shapes: Shapes) -> float:
    """Bytes of the fused loss: both models' hidden states of a whole row, one chunk's scores, gradients of head and
    hidden states; and the final norm's tensors."""
    loss, parallel, width = options.loss(), options.parallel, shapes.layer.width
    tp = parallel.tensor_model_parallel_size
    row = shapes.hidden_bytes * tp
    taught = options.model.stage in ("1", "2")
    gathered = (2 if taught else 1) * row if tp > 1 else 0.0
    columns = shapes.vocabulary / tp
    chunk = min(loss.chunk_tokens, shapes.tokens * tp)
    scores = chunk * columns * (4 * SCORES.get(loss.kind, 4) + (2 * width if width < 4 else 0))
    if loss.kind == "ce" and taught:
        scores = chunk * columns * (16 + (2 * width if width < 4 else 0))
    head = 0.0
    if options.model.trainable == "all":
        head += shapes.count.head * (4 + width)
    if taught and options.distill.teacher_memory == "offload":
        head += shapes.count.head * width
    # Megatron's bf16 wrapper hands the hidden states out in fp32.
    norm = 2 * shapes.hidden_bytes + (3 * shapes.hidden_bytes if width < 4 else 0)
    return gathered + 2 * row + scores + head + norm
