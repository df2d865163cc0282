"""The ways in which a Megatron tensor is made of Hugging Face tensors, on whole (unsharded) tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Shape = tuple[int, ...]
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class DeltaDims:
    """Sizes of gated delta networks."""

    key_heads: int
    """Heads of queries and keys."""

    key_channels: int
    """Channels of one of them."""

    values: int
    """Value heads of each key head."""

    value_channels: int
    """Channels of a value head."""


@dataclass(frozen=True)
class ModelDims:
    """The numbers that names and shapes do not tell."""

    num_query_groups: int
    """Key/value heads."""

    head_dim: int
    """Channels of one attention head."""

    num_real_experts: int = 0
    """N: router rows of the static model."""

    seed: int = 0
    """Seed of new zero rows."""

    paired: bool = False
    """Paired zero experts: the router's weight has one row more on disk (`Router`)."""

    delta: DeltaDims | None = None
    """Where some layers are gated delta networks."""


class WeightMapping(Protocol):
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    mcore: str

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        """For a Megatron tensor of `shape`: each Hugging Face key with the shapes it may have on disk."""

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        """Build the Megatron tensor of `shape`; `read(key)` loads one Hugging Face tensor."""

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        """Take it apart again; the parts may be views."""


@dataclass(frozen=True)
class Direct:
    """The same tensor under two names."""

    hf: str
    mcore: str

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        return {self.hf: (shape,)}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        return read(self.hf)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        return {self.hf: tensor}


@dataclass(frozen=True)
class Repeated(Direct):
    """One tensor that a folder has under several names, with the same bits: `hf`, and, if it likes, `also` (joined by
    spaces)."""

    also: str

    def repeats(self) -> list[str]:
        """The other names."""
        return self.also.split()

    def _names(self) -> list[str]:
        return [self.hf, *self.repeats()]

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        return dict.fromkeys(self._names(), (shape,))

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        return dict.fromkeys(self._names(), tensor)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projection in one: per query group [its q heads; its k; its v] on dim 0.

    Weights [(heads + 2 groups) * head_dim, H] and biases [(heads + 2 groups) * head_dim].
    """

    q: str
    k: str
    v: str
    mcore: str

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        rows, *rest = shape
        kv_rows = dims.num_query_groups * dims.head_dim
        q_shape, kv_shape = (rows - 2 * kv_rows, *rest), (kv_rows, *rest)
        return {self.q: (q_shape,), self.k: (kv_shape,), self.v: (kv_shape,)}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        groups, rest = dims.num_query_groups, shape[1:]
        parts = [read(key).reshape(groups, -1, *rest) for key in (self.q, self.k, self.v)]
        return torch.cat(parts, dim=1).reshape(shape)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        rest, d = tensor.shape[1:], dims.head_dim
        grouped = tensor.reshape(dims.num_query_groups, -1, *rest)
        cuts = [grouped.shape[1] - 2 * d, d, d]
        parts = [part.reshape(-1, *rest) for part in grouped.split(cuts, dim=1)]
        return dict(zip((self.q, self.k, self.v), parts))


@dataclass(frozen=True)
class GatedQKV(QKV):
    """The same where attention has an output gate: per query group [its q heads; their gates; its k; its v].

    On disk `q` has, for each head, its query rows and then those of its gate.
    """

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        groups, d, rest = dims.num_query_groups, dims.head_dim, shape[1:]
        q = read(self.q).reshape(groups, -1, 2, d, *rest).transpose(1, 2)
        parts = [part.reshape(groups, -1, *rest) for part in (q, read(self.k), read(self.v))]
        return torch.cat(parts, dim=1).reshape(shape)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        parts = super().to_hf(tensor, dims)
        q, rest = parts[self.q], tensor.shape[1:]
        by_head = q.reshape(dims.num_query_groups, 2, -1, dims.head_dim, *rest).transpose(1, 2)
        return parts | {self.q: by_head.reshape(q.shape)}


@dataclass(frozen=True)
class KeyHeads:
    """Rows that belong to the key heads of gated delta networks: for each key head its rows of all sections, one after
    another, so that tensor parallelism deals out whole heads.

    A tensor on disk has one section after another, each with the rows of all key heads. What a key head has of a
    section is said in letters: `k` channels of the key head, `v` channels of its value heads, `n` one row for each of
    these. `k,k,v` are queries, keys and values as three sections; in `kkv` each key head has the three together.
    """

    hf: str
    """Names of the tensors on disk, joined by spaces."""
    sections: str
    """Their sections in the same order: those of a tensor joined by commas."""
    mcore: str

    def _rows(self, dims: ModelDims) -> dict[str, list[int]]:
        """Each tensor's sections, in rows of one key head."""
        delta = dims.delta
        sizes = {"k": delta.key_channels, "v": delta.values * delta.value_channels, "n": delta.values}
        return {
            name: [sum(sizes[letter] for letter in section) for section in sections.split(",")]
            for name, sections in zip(self.hf.split(), self.sections.split(), strict=True)
        }

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        heads = dims.delta.key_heads
        return {name: ((heads * sum(rows), *shape[1:]),) for name, rows in self._rows(dims).items()}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        heads, parts = dims.delta.key_heads, []
        for name, rows in self._rows(dims).items():
            sections = read(name).split([heads * count for count in rows])
            parts += [section.reshape(heads, -1, *shape[1:]) for section in sections]
        return torch.cat(parts, dim=1).reshape(shape)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        rest, by_name = tensor.shape[1:], self._rows(dims)
        grouped = tensor.reshape(dims.delta.key_heads, -1, *rest)
        parts = iter(grouped.split([count for rows in by_name.values() for count in rows], dim=1))
        return {
            name: torch.cat([next(parts).reshape(-1, *rest) for _ in rows]) for name, rows in by_name.items()
        }


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection of a gated MLP, [2F, H] = [gate; up]."""

    gate: str
    up: str
    mcore: str

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        half = (shape[0] // 2, *shape[1:])
        return {self.gate: (half,), self.up: (half,)}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        return torch.cat([read(self.gate), read(self.up)])

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        gate, up = tensor.chunk(2)
        return {self.gate: gate, self.up: up}


@dataclass(frozen=True)
class Router:
    """Router weight [N+Nz, H], zero rows last.

    A static checkpoint has N rows: the missing ones are drawn (`zero_rows`). One that has N+Nz is kept. With paired
    zero experts Megatron has N rows and the folder N+1, the last one of zeros that nothing reads: a loader that does
    not know paired routing fails on the shape, where it would have opened the static model without a word.
    """

    hf: str
    mcore: str

    def _unread_rows(self, dims: ModelDims) -> int:
        return 1 if dims.paired else 0

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        rows, *rest = shape
        possible = ((dims.num_real_experts, *rest), (rows + self._unread_rows(dims), *rest))
        return {self.hf: tuple(dict.fromkeys(possible))}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        tensor = read(self.hf)
        if self._unread_rows(dims):
            return tensor[: shape[0]]
        return widen(tensor, shape[0], dims.seed, self.hf)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        unread = tensor.new_zeros(self._unread_rows(dims), *tensor.shape[1:])
        return {self.hf: torch.cat([tensor, unread]) if len(unread) else tensor}


@dataclass(frozen=True)
class RowBias(Router):
    """One number for each row of a router [N+Nz], such as its bias."""

    def _unread_rows(self, dims: ModelDims) -> int:
        return 0


@dataclass(frozen=True)
class ScoreBias(RowBias):
    """The bias that chooses among scores, which no `--dtype` rounds."""


@dataclass(frozen=True)
class Added(Direct):
    """A parameter that static checkpoints lack (of learned or paired zero experts): zeros there."""


@dataclass(frozen=True)
class Setting:
    """A float32 number [1] that Hugging Face folders keep in config.json: one for all MoE layers, or one each.

    No key of the weights belongs to it; `read(hf)` must give this layer's number.
    """

    key: str
    """Key of config.json."""
    hf: str
    """What `read` calls it."""
    mcore: str

    def hf_shapes(self, shape: Shape, dims: ModelDims) -> dict[str, tuple[Shape, ...]]:
        return {}

    def to_mcore(self, read: Read, shape: Shape, dims: ModelDims) -> torch.Tensor:
        return read(self.hf)

    def to_hf(self, tensor: torch.Tensor, dims: ModelDims) -> dict[str, torch.Tensor]:
        return {}


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a tensor's name only, not on the order of conversion."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def zero_rows(old: torch.Tensor, count: int, seed: int, name: str) -> torch.Tensor:
    """Draw `count` rows like the old ones: Gaussian, with their mean and deviation per hidden dimension.

    `old` is a router weight [N, H] or a score bias [N] (one mean and deviation then). Statistics and draw are
    in float32, the result has the type of `old`: [count, H] or [count]. Source: arXiv 2605.18643 (the authors
    draw without a seed).
    """
    old_float = old.float()
    mean = old_float.mean(dim=0)
    std = old_float.std(dim=0) if old.shape[0] > 1 else torch.zeros_like(mean)
    noise = torch.randn((count, *old.shape[1:]), generator=seeded_generator(seed, name))
    return (mean + std * noise).to(old.dtype)


def widen(old: torch.Tensor, rows: int, seed: int, name: str) -> torch.Tensor:
    """Append zero rows until there are `rows`; the old rows stay bit for bit, enough rows are left alone."""
    if old.shape[0] == rows:
        return old
    return torch.cat([old, zero_rows(old, rows - old.shape[0], seed, name)])
