"""GPU memory of a training recipe: what stands all the time, and what each phase of a step adds to it.

Weights, gradients, optimizer states and the teacher are counted exactly; activations, buffers of the dispatch, the
loss's working set and the key/value cache are estimates from shapes. Two loads of the experts: rows spread evenly, and
the worst case, in which every pick of the expert-parallel group that can go to one rank goes there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..config.options import Options
from ..config.zero_experts import ZeroExpertConfig
from ..errors import UserError
from ..models.architecture import Architecture
from .memory_activations import ExpertLoad, Layer, kept_per_layer
from .memory_parameters import StageParameters, stage_parameters

GIB = 1 << 30


@dataclass(frozen=True)
class Assumptions:
    """What no option says."""

    gpus: int
    """GPUs of the whole run."""
    gpu_memory: float = 80.0
    """GiB of one."""
    zero_share: float = 0.0
    """Share of picks that go to zero experts; 0 is safe, and what the teacher has."""
    prompt_tokens: int = 1024
    """Longest prompt, while answers are generated."""
    context_gib: float = 1.5
    """CUDA context, NCCL's buffers, libraries' workspaces."""
    fragmentation: float = 0.05
    """What the allocator loses, as a share of all the rest."""


@dataclass(frozen=True)
class Load:
    """Bytes with experts evenly loaded, and at their worst."""

    average: float
    """Even load."""
    worst: float
    """Worst case."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage."""

    stage: int
    """Which one, from 0."""
    standing: dict[str, float]
    """Part -> bytes that are there all the time."""
    on_host: float = 0.0
    """Bytes of host memory beside it."""
    phases: dict[str, dict[str, Load]] = field(default_factory=dict)
    """Phase of a step -> part -> bytes it adds. Phases follow one another."""
    assumptions: Assumptions | None = None
    """What the reserve is taken from."""

    def peak_phase(self, worst: bool = False) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: self._sum(name, worst))

    def total(self, worst: bool = False) -> float:
        """Bytes at the peak, reserve included."""
        return self.needed(worst) + self.reserve(worst)

    def needed(self, worst: bool = False) -> float:
        """Bytes at the peak without the reserve."""
        return sum(self.standing.values()) + self._sum(self.peak_phase(worst), worst)

    def reserve(self, worst: bool = False) -> float:
        """Bytes set aside for context and fragmentation."""
        return self.assumptions.context_gib * GIB + self.assumptions.fragmentation * self.needed(worst)

    def _sum(self, phase: str, worst: bool) -> float:
        return sum(load.worst if worst else load.average for load in self.phases[phase].values())


def estimate(
    options: Options, arch: Architecture, zero: ZeroExpertConfig, about: Assumptions
) -> list[StageMemory]:
    """All pipeline stages. Raises `UserError` for a layout that does not fit the GPUs."""
    parallel = options.parallel
    replicas = data_ranks(options, about.gpus)
    rows = replicas * parallel.context_parallel_size  # ranks that share a dense gradient
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    copies = about.gpus // (ranks * parallel.pipeline_model_parallel_size)
    found = []
    for stage, count in enumerate(stage_parameters(arch, parallel, zero, options.model.lora)):
        standing = standing_bytes(options, count, rows, copies)
        phases = {}
        for worst in (False, True):
            shapes = Shapes.of(options, arch, zero, count, stage, replicas, about.zero_share, worst)
            for name, parts in _phases(options, shapes, about).items():
                phases.setdefault(name, {})[worst] = parts
        loads = {
            name: {part: Load(by[False][part], by[True][part]) for part in by[True]}
            for name, by in phases.items()
        }
        host = host_bytes(options, count, rows, copies)
        found.append(StageMemory(stage, standing, host, loads, about))
    return found


def _phases(options: Options, shapes: Shapes, about: Assumptions) -> dict[str, dict[str, float]]:
    stage, made = options.model.stage, {}
    if stage in ("0", "2"):
        made["answers"] = answers(options, shapes, about.prompt_tokens)
    if stage in ("1", "2"):
        made["teacher's pass"] = teacher_pass(options, shapes)
    if stage != "0":
        made["student's pass"] = student_pass(options, shapes)
    return made


def standing_bytes(options: Options, count: StageParameters, rows: int, copies: int) -> dict[str, float]:
    """Weights, gradients, optimizer states and teacher of one GPU.

    Args:
        rows: ranks over which optimizer states of dense parameters are sharded. copies: the same for experts.
    """
    width = 2 if options.model.bf16 else 4
    made = {"weights": float(width * count.total)}
    if options.model.stage == "0":
        return made
    dense, expert = count.trainable(options.model.trainable, options.share.paired_head_lr > 0)
    made["gradients (fp32)"] = 4.0 * (dense + expert)
    if options.optimizer.optimizer_cpu_offload:
        made["optimizer (on the host)"] = 0.0
    else:
        sharded = " (sharded)" if options.optimizer.use_distributed_optimizer else ""
        updated, state = _updated(options, count, rows, copies)
        made[f"optimizer{sharded}"] = float(updated * state)
    if options.model.stage in ("1", "2"):
        mode = options.distill.teacher_memory
        # Adapters are switched off in its passes.
        apart = {"mtp": 0, "lora": dense - count.adapters}
        first = apart.get(options.model.trainable, dense + expert)
        held = {"own": count.of_decoder, "offload": 0, "shared": first}[mode]
        made[f"teacher ({mode})"] = float(width * held)
    return made


def _updated(options: Options, count: StageParameters, rows: int, copies: int) -> tuple[int, int]:
    """Parameters that this rank's optimizer updates, and bytes of its states for each."""
    dense, expert = count.trainable(options.model.trainable, options.share.paired_head_lr > 0)
    if options.optimizer.use_distributed_optimizer:
        dense, expert = math.ceil(dense / rows), math.ceil(expert / copies)
    # Two moments; under bf16 the fp32 weights too.
    return dense + expert, 12 if options.model.bf16 else 8


def host_bytes(options: Options, count: StageParameters, rows: int, copies: int) -> float:
    """Bytes of host memory that one GPU's process needs for what waits or is updated there; arguments as above."""
    held = 0.0
    if options.optimizer.optimizer_cpu_offload and options.model.stage != "0":
        updated, state = _updated(options, count, rows, copies)
        held += updated * (state + 4)  # gradients go there in fp32
    if options.model.stage in ("1", "2") and options.distill.teacher_memory == "offload":
        held += (2 if options.model.bf16 else 4) * count.of_decoder
    return held


def data_ranks(options: Options, gpus: int) -> int:
    """Data-parallel size. Raises `UserError` if the layout does not fit the GPUs or the rows."""
    parallel = options.parallel
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    for name, size in (
        ("tensor x pipeline x context parallel size", parallel.model_parallel_size),
        (
            "expert x expert-tensor x pipeline parallel size",
            ranks * parallel.pipeline_model_parallel_size,
        ),
    ):
        if gpus < 1 or gpus % size:
            raise UserError(f"--gpus {gpus}: {name} = {size} does not divide it")
    replicas, batch = gpus // parallel.model_parallel_size, options.optimizer.global_batch_size
    if options.model.stage in ("pretrain", "1") and batch % replicas:
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of the {replicas} data-parallel ranks"
        )
    return replicas


CACHE_SLACK = 64
"""Columns that the engine's cache has more than the longest answer needs."""
MTP_ROWS = 7
"""Hidden states of a row that a head of multi-token prediction keeps beside its layer: embedding, norms of it and of
the decoder's state, both joined (two), what `eh_proj` and the layer give."""
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
    if count.mtp:  # its one layer is not recomputed as a whole
        recomputed = recompute if recompute == "selective" else None
        kept += kept_per_layer(layer, recomputed, shapes.tokens, shapes.load, True)
        kept += MTP_ROWS * shapes.hidden_bytes
    if options.distill.hidden_loss_coeff and recompute != "full":
        kept += shapes.hidden_bytes * count.layers  # the gradient of each layer's error
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
        made["teacher's weights, fetched"] = float(shapes.layer.width * shapes.count.of_decoder)
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
    states = rows * layer.state() * shapes.count.linear_layers
    attending = shapes.count.layers - shapes.count.linear_layers
    # While answering, nothing splits sequences; ranks of one tensor-parallel group send the same rows.
    tokens = rows * min(prompt_tokens, longest)
    load = layer.load(tokens, worst=shapes.worst)
    head = rows * shapes.vocabulary * (layer.width + 12) if shapes.is_last else 0.0
    split = tokens / options.parallel.tensor_model_parallel_size
    return {
        "keys and values": cache * attending + states,
        # Prefills wait in a cache of their own; decoding rotates all keys of a layer.
        "one layer at work": max(shapes.busiest(split, load), 3 * cache) + head,
        "prefill's cache": tokens * layer.cache() * attending + states,
        "dispatch buffers": layer.dispatch(load) if shapes.count.moe_layers else 0.0,
    }


def _teacher_hidden(options: Options, shapes: Shapes) -> float:
    """What the student will meet: what the last stage gave, and where hidden states are matched, what all layers gave
    (which waits on the host for an offloaded teacher's student)."""
    ahead, last = options.distill.teacher_schedule == "ahead", float(shapes.is_last)
    rows = shapes.microbatches if ahead else 1
    if not options.distill.hidden_loss_coeff or options.distill.teacher_memory == "offload":
        return shapes.hidden_bytes * rows * last
    # Recomputed, alongside: they wait for the backward pass.
    waiting = rows if ahead or options.model.recompute_granularity != "full" else shapes.in_flight
    return shapes.hidden_bytes * (rows * last + waiting * shapes.count.layers)


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
    # Drafts: their states, the gradient of these, the teacher's states moved by one position.
    drafts = 3 * row if shapes.count.mtp else 0.0
    return gathered + 2 * row + scores + head + norm + drafts
