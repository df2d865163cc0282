"""Declarative maps between Hugging Face and Megatron weights, on whole (unsharded) tensors.

A model's map is a list of small mapping objects (`weight_kinds`) whose names carry the wildcards `{layer}` and
`{expert}`. The names of the Megatron model decide which of them apply: a dense layer picks the dense MLP's mapping, an
MoE layer the experts'.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from ..errors import UserError
from .weight_kinds import Added, ModelDims, Shape, WeightMapping


@lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern:
    quoted = re.escape(template)
    for wildcard in ("layer", "expert"):
        quoted = quoted.replace(re.escape(f"{{{wildcard}}}"), rf"(?P<{wildcard}>\d+)")
    return re.compile(quoted)


def _bind(mapping: WeightMapping, numbers: dict[str, str]) -> WeightMapping:
    filled = {f.name: getattr(mapping, f.name).format(**numbers) for f in dataclasses.fields(mapping)}
    return dataclasses.replace(mapping, **filled)


@dataclass(frozen=True)
class WeightMap:
    """All mappings of one architecture."""

    mappings: tuple[WeightMapping, ...]
    """Templates; each Megatron name must match exactly one."""

    tied: dict[str, str] = field(default_factory=dict)
    """Hugging Face keys that repeat another key where the model shares the two."""

    ignored: tuple[str, ...] = ()
    """Regular expressions of Hugging Face keys that carry no weight of the model (full match)."""

    def for_mcore_name(self, name: str) -> WeightMapping:
        """The mapping of one Megatron parameter, wildcards filled in.

        Raises:
            UserError: no mapping knows this name.
        """
        for mapping in self.mappings:
            match = _pattern(mapping.mcore).fullmatch(name)
            if match:
                return _bind(mapping, match.groupdict())
        raise UserError(f"Megatron parameter {name} has no counterpart in this architecture's weight map")

    def bind(
        self,
        shapes: dict[str, Shape],
        hf_keys: Iterable[str],
        dims: ModelDims,
        source: str = "the checkpoint",
    ) -> dict[str, WeightMapping]:
        """Find the mapping of every Megatron parameter and check that every Hugging Face key is used once.

        Args:
            shapes: global shape of every Megatron parameter (and persistent buffer).
            hf_keys: keys of the Hugging Face checkpoint.
            source: what the errors call that checkpoint.

        Returns:
            Megatron name -> mapping, in the order of `shapes`.

        Raises:
            UserError: listing the first keys that are missing, unknown or used twice.
        """
        bound = {name: self.for_mcore_name(name) for name in shapes}
        left = set(hf_keys)
        used: set[str] = set()
        missing = []
        for name, mapping in bound.items():
            for key in mapping.hf_shapes(shapes[name], dims):
                if key in used:
                    raise UserError(
                        f"{source}: tensor {key} is used twice (again for Megatron parameter {name})"
                    )
                used.add(key)
                if key not in left and not isinstance(mapping, Added):
                    missing.append(key)
        if missing:
            raise UserError(f"{source}: {len(missing)} tensors are missing: {_first(missing)}")
        unknown = sorted(
            key for key in left - used if not self.is_repeat(key, used) and not self.is_ignored(key)
        )
        if unknown:
            raise UserError(
                f"{source}: {len(unknown)} tensors do not belong to this architecture: {_first(unknown)}"
            )
        return bound

    def is_repeat(self, key: str, used: Iterable[str]) -> bool:
        """True if `key` only repeats a tied tensor."""
        return key not in used and self.tied.get(key) in used

    def is_ignored(self, key: str) -> bool:
        """True if `key` carries no weight of the model."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def _first(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
