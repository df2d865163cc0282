"""Tiny models with a head of multi-token prediction: their folders as published, the head in plain PyTorch."""

from __future__ import annotations

import copy
from importlib import import_module

import tiny
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
"""Tensors of the head besides its decoder layer's, without `.weight`."""


class WithHead(torch.nn.Module):
    """A stock model and a head: the definition, written here."""

    def __init__(self, seed: int = 0, std: float = 0.3, family: str = "glm4_moe_lite", **changes):
        super().__init__()
        self.model = FAMILIES[family].make(seed, std, **changes)
        self.model.config.num_nextn_predict_layers = 1
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "mlp_layer_types"):
            config.mlp_layer_types = [*config.mlp_layer_types, "sparse"]
        modeling = import_module(f"transformers.models.{family}.modeling_{family}")
        layer = getattr(modeling, f"{FAMILIES[family].stem}DecoderLayer")
        self.layer = layer(config, config.num_hidden_layers).eval()
        size, draw = config.hidden_size, torch.Generator().manual_seed(seed + 50)

        def drawn(shape, mean=0.0):
            return torch.nn.Parameter(mean + std * torch.randn(shape, generator=draw))

        self.norms = torch.nn.ParameterDict({name: drawn(size, 1.0) for name in ("enorm", "hnorm", "norm")})
        self.eh_proj = drawn((size, 2 * size))
        with torch.no_grad():
            for name, tensor in self.layer.state_dict().items():
                mean = 1.0 if "norm" in name else 0.0
                scale = 0.2 if name.endswith("e_score_correction_bias") else std
                tensor.copy_(mean + scale * torch.randn(tensor.shape, generator=draw))

    def _norm(self, name: str, x):
        return F.rms_norm(x, x.shape[-1:], self.norms[name], self.model.config.rms_norm_eps)

    def draft_logits(self, tokens_S: torch.Tensor) -> torch.Tensor:
        """[S-1, V]: at position t what the head says of token t+2, from one sequence alone."""
        tokens_BS = tokens_S[None]
        hidden = self.model.model(tokens_BS).last_hidden_state[:, :-1]
        embedded = self.model.model.embed_tokens(tokens_BS)[:, 1:].clone()
        embedded[:, 0] = 0.0  # as vLLM does
        joined = (
            torch.cat([self._norm("enorm", embedded), self._norm("hnorm", hidden)], dim=-1) @ self.eh_proj.t()
        )
        length = joined.shape[1]
        places = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        rotary = self.model.model.rotary_emb(joined, places)
        made = self.layer(joined, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        made = made[0] if isinstance(made, tuple) else made
        return self.model.lm_head(self._norm("norm", made))[0]

    def save(self, folder, dtype=torch.float32) -> None:
        """A folder as published: one layer more than the config counts, embedding and LM head repeated in it."""
        biases = {
            k: v.clone() for k, v in self.model.named_buffers() if k.endswith("e_score_correction_bias")
        }
        stock = copy.deepcopy(self.model).to(dtype)
        for name, buffer in stock.named_buffers():
            if name in biases:
                buffer.data = biases[name]  # in float32, whatever the model's type
        stock.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        head = f"model.layers.{self.model.config.num_hidden_layers}."
        read = tiny.hf_reader(_Named(self.layer, head))
        for name, tensor in self.layer.state_dict().items():
            keep = name.endswith("e_score_correction_bias")
            if ".experts." not in name:
                tensors[head + name] = tensor.clone() if keep else tensor.to(dtype)
        for expert in range(self.model.config.n_routed_experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                key = f"{head}mlp.experts.{expert}.{part}.weight"
                tensors[key] = read(key).to(dtype).contiguous()
        own = (self.norms["enorm"], self.norms["hnorm"], self.eh_proj, self.norms["norm"])
        tensors |= {f"{head}{name}.weight": part.detach().to(dtype) for name, part in zip(OWN, own)}
        tensors[f"{head}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tied = self.model.config.tie_word_embeddings
        lm_head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
        tensors[f"{head}shared_head.head.weight"] = lm_head.clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def save_pretrained(self, folder) -> None:
        """So that `tiny_world.make_world` takes it."""
        self.save(folder)


class _Named:
    """A module whose state has names with a prefix."""

    def __init__(self, module, prefix: str):
        self.module, self.prefix = module, prefix

    def state_dict(self):
        return {self.prefix + name: tensor for name, tensor in self.module.state_dict().items()}
