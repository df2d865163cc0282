"""Experts of the local layer spec: Megatron's parameters and checkpoint names, a faster product."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from ..errors import UserError
from ..ops import expert_kernels
from ..ops.grouped_mlp import BACKENDS, SWIGLU, GatedUnit, LowRank, grouped_mlp, lay_side_by_side


class GroupedExperts(SequentialMLP):
    """`SequentialMLP` whose forward hands all local experts to one operator.

    Parameters, names and checkpoints are those of `SequentialMLP` (`local_experts.<e>.linear_fc1.weight`, ...).
    Falls back to the stock loop where the operator does not apply (expert tensor parallelism, quantised training), and
    `auto` from kernels to `grouped_mm` where an expert is more than a SwiGLU (biases, other units).
    """

    def __init__(
        self, num_local_experts, config, submodules, pg_collection=None, *, backend: str = "auto", **kwargs
    ):
        super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection, **kwargs)
        self.backend = backend_for(backend, next(self.parameters()).device, config.params_dtype)
        self.unit = GatedUnit(
            config.activation_func, config.activation_func_clamp_value, config.glu_linear_offset
        )
        self.biased = config.add_bias_linear
        self._gathered = None
        self.plain = (
            config.gated_linear_unit
            and not config.fp8
            and not config.fp4
            and not config.moe_apply_probs_on_input
            and self.tp_group.size() == 1
            # Both products want rows that start at multiples of 16 bytes.
            and (config.hidden_size * config.params_dtype.itemsize) % 16 == 0
            and (config.moe_ffn_hidden_size * config.params_dtype.itemsize) % 16 == 0
        )
        if self.backend == "kernels" and (self.biased or self.unit != SWIGLU or not self.plain):
            if backend == "kernels":
                raise UserError(
                    "--expert-backend kernels: they know SwiGLU without biases, in rows of whole 16 bytes, without "
                    "expert tensor parallelism, fp8, fp4 and probabilities on the input; use auto"
                )
            self.backend = "grouped_mm"

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        """rows [R, H] sorted by expert, counts [E_local], probs [R] -> ([R, H], None)."""
        low_rank = self.low_rank()
        if low_rank is None and (not self.plain or self.backend == "loop"):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        fc1, fc2, biases = self._parts()
        # Kernels know no adapters.
        backend = "grouped_mm" if low_rank is not None and self.backend == "kernels" else self.backend
        output = grouped_mlp(
            permuted_local_hidden_states,
            permuted_probs,
            tokens_per_expert,
            fc1,
            fc2,
            backend,
            self.unit,
            biases,
            low_rank,
        )
        return output, None

    def low_rank(self) -> LowRank | None:
        """Adapters of all local experts that are to answer now, or None. `models.adapters` gives them."""
        return None

    def _parts(self) -> tuple[list, list, tuple[list, list] | None]:
        """fc1 and fc2 weights and biases of all experts, gathered once: that takes longer than to multiply few rows."""
        kept, experts = self._gathered, self.local_experts
        if (
            kept is None
            or kept[0][0] is not experts[0].linear_fc1.weight
            or kept[1][-1] is not experts[-1].linear_fc2.weight
        ):
            keep = expert_kernels.installed().keep if self.backend == "kernels" else list
            layers = [[getattr(one, name) for one in experts] for name in ("linear_fc1", "linear_fc2")]
            fc1, fc2 = (keep([layer.weight for layer in part]) for part in layers)
            if self.backend == "grouped_mm":  # kernels take weights wherever they lie
                lay_side_by_side(fc1)
                lay_side_by_side(fc2)
            biases = tuple([layer.bias for layer in part] for part in layers) if self.biased else None
            self._gathered = kept = fc1, fc2, biases
        return kept

    def _apply(self, *args, **kwargs):
        self._gathered = None  # parameters may become other objects
        return super()._apply(*args, **kwargs)


def choose_backend(name: str) -> str:
    """`name` itself. Raises `UserError` for unknown names."""
    if name not in ("auto", *BACKENDS):
        raise UserError(f"--expert-backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    return name


def backend_for(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `--expert-backend` means there: `auto` takes kernels where they are installed, built and run on a GPU, else
    grouped_mm.

    On the CPU `kernels` runs their reference. Raises `UserError` if they are not installed, or a GPU cannot run them.
    """
    choose_backend(name)
    if name == "auto":
        own = device.type == "cuda" and not expert_kernels.why_not(device, dtype)
        return "kernels" if own else "grouped_mm"
    reason = expert_kernels.why_not(device, dtype) if name == "kernels" else None
    if reason:
        raise UserError(f"--expert-backend kernels: {reason}; or use auto")
    return name


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Give expert parameters `allreduce=False` on every layout, and biases no sum over tensor-parallel ranks.

    Megatron sets it only with expert parallelism; with TP > 1, EP = 1 and ETP = 1 replicas of an expert would
    get different gradients and drift apart silently, and optimizer states would not reshard. Its output biases ask for
    a sum under sequence parallelism, and count once in the gradient's norm, but those ranks may hold other experts.
    """
    for name, parameter in model.named_parameters():
        if _is_expert(name):
            parameter.allreduce = parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True


def draw_experts_apart(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Draw other initial experts on every expert-parallel rank.

    Megatron's initialisation on the CPU uses one random stream, the same on all ranks: expert 0 of each rank
    would be the same. (On the GPU it has a stream per rank.)
    """
    rank = parallel_state.get_expert_model_parallel_rank() if parallel_state.is_initialized() else 0
    if not config.use_cpu_initialization or not config.perform_initialization or rank == 0:
        return
    slice_rank = parallel_state.get_expert_tensor_parallel_rank()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(torch.initial_seed() + 1_000_003 * rank + 7919 * slice_rank)
        for name, parameter in model.named_parameters():
            if _is_expert(name) and parameter.device.type == "cpu":
                draw = config.output_layer_init_method if ".linear_fc2." in name else config.init_method
                draw(parameter)


def _is_expert(name: str) -> bool:
    return ".local_experts." in name or ".mlp.experts." in name
