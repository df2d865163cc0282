"""The models that serving speed compares: one set of random weights, four ways to treat zero slots.

The zero share is forced, as random weights have none of their own: an exact number of the router's picks, drawn
at random, become zero slots. So a figure is the speed at a share, not of a trained model.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import REGISTRY, Architecture, read_architecture
from zeda_megatron.serving.transformers.zero_expert_routing import ZeroDials, stand_ins

WAYS = ("static", "skip", "stand-ins", "weight 0")
"""static: the stock layer. skip: ours, silent. stand-ins: ours, low-rank maps answer. weight 0: a zero slot is a slot
of expert 0 whose weight is 0, as engines do that know no zero slots (reference: vLLM's router for zero experts)."""


class ForcedShare(nn.Module):
    """A router whose picks become zero slots with a given share."""

    def __init__(self, gate: nn.Module, rank: int, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        experts, hidden = gate.num_real, gate.weight.shape[1]
        shapes = (experts, rank, hidden), (experts, hidden, rank), (experts, hidden)
        self.maps = [torch.full(shape, 0.01, dtype=dtype, device=gate.weight.device) for shape in shapes]
        self.gate, self.share, self.way = gate, 0.0, "static"
        self.seed = seed
        self._drawn: dict[tuple, torch.Tensor] = {}

    def forward(self, hidden_states):
        logits, weights_TK, ids_TK, _ = self.gate(hidden_states)
        if self.way == "static":
            return logits, weights_TK, ids_TK, None
        zero_TK = self._zero_slots(ids_TK)
        if self.way != "weight 0":
            silent = self.way == "skip"
            answer_TH = None if silent else stand_ins(hidden_states, weights_TK, ids_TK, zero_TK, *self.maps)
            return logits, weights_TK, torch.where(zero_TK, self.gate.num_real, ids_TK), answer_TH
        return logits, weights_TK.masked_fill(zero_TK, 0), ids_TK.masked_fill(zero_TK, 0), None

    def _zero_slots(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Which slots are zero slots: drawn once a shape and share, so that no pass is timed while drawing."""
        key = (tuple(ids_TK.shape), self.share, ids_TK.device)
        if key not in self._drawn:
            slots, draw = ids_TK.numel(), torch.Generator().manual_seed(self.seed)
            zero_S = torch.randperm(slots, generator=draw)[: round(self.share * slots)]
            zero_TK = torch.zeros(slots, dtype=torch.bool).index_fill_(0, zero_S, True).view_as(ids_TK)
            self._drawn[key] = zero_TK.to(ids_TK.device)
        return self._drawn[key]


class Contest:
    """A model of the real layer geometry with random weights, whose way and share are set between passes.

    Args:
        folder: HF folder with a config.json.
        layers: MoE layers to build; dense first layers are left out. rank: of the stand-ins.
    """

    def __init__(
        self,
        folder: Path,
        layers: int,
        dtype: torch.dtype,
        device: str,
        vocabulary: int = 1024,
        rank: int = 16,
    ):
        arch = read_architecture(folder)
        self.model = _build(arch, layers, dtype, device, vocabulary)
        self.gates, self.blocks = [], self.model.moe_blocks()
        for block in self.blocks:
            block.gate.dials = ZeroDials(masked=True)  # the router itself is always the static one
            block.gate = ForcedShare(block.gate, rank, dtype, seed=len(self.gates))
            self.gates.append(block.gate)
        if len(self.gates) != layers:
            raise UserError(f"{folder}: {len(self.gates)} MoE layers were built, not {layers}")
        self.vocabulary, self.device = vocabulary, device

    @contextmanager
    def arm(self, way: str, share: float):
        """Inside, all layers treat zero slots this way."""
        self._set(way, share)
        yield self.model
        self._set("static", 0.0)

    def _set(self, way: str, share: float) -> None:
        for gate, block in zip(self.gates, self.blocks):
            gate.way, gate.share = way, share
            # All but ours take the stock path over real experts.
            block.dials.masked = way not in ("skip", "stand-ins")


def _build(arch: Architecture, layers: int, dtype: torch.dtype, device: str, vocabulary: int):
    family = REGISTRY[arch.name]
    module = import_module(f"zeda_megatron.serving.transformers.{family.MODELING_FILE.removesuffix('.py')}")
    model_class = getattr(module, family.ARCHITECTURES[1])
    small = {"num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": False}
    small |= {f"{kind}_token_id": None for kind in ("pad", "bos", "eos")}
    # Every layer has experts; each family reads the key that it knows.
    small |= {"mlp_only_layers": [], "mlp_layer_types": ["sparse"] * layers, "num_nextn_predict_layers": 0}
    zero = {"zce_nums": [1], "zce_types": ["zero"], "model_type": family.MODEL_TYPES[0]}
    config = model_class.config_class.from_dict(arch.hf | small | zero)
    config.dtype = dtype
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()
