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
from .weight_kinds import (
    QKV,
    Added,
    Direct,
    GatedQKV,
    GateUp,
    KeyHeads,
    ModelDims,
    Repeated,
    Router,
    ScoreBias,
    Setting,
    Shape,
    WeightMapping,
)

_MERGED = re.compile(r"\.experts\.[a-z0-9_]+(\.weight)?$")
"""Parameters of all experts in one tensor: no number stands behind `experts`."""


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
class FusedExperts:
    """The matrices of all experts of a layer in one tensor: E experts, F inner and H hidden channels."""

    turned: bool = False
    """Each expert's matrix is [in, out]; else it is [out, in], as a linear layer's."""
    interleaved: bool = False
    """Gate and up channels take turns; else those of the gate come first."""


HALVES = FusedExperts()
"""`gate_up_proj` [E, 2F, H] and `down_proj` [E, H, F]: the layout that transformers has in memory."""
TURNS = FusedExperts(turned=True, interleaved=True)
"""`gate_up_proj` [E, H, 2F], `gate_up_proj_bias` [E, 2F], `down_proj` [E, F, H], `down_proj_bias` [E, H]: gpt-oss's."""


@dataclass(frozen=True)
class PublishedNames:
    """What published folders have in place of plain names, those of a text model with tensors for each expert
    (`model.layers.3.mlp.experts.7.gate_proj.weight`). Both are read; an export writes the published ones again. A model
    that sees, too, may have

        PublishedNames(prefixes=(("model.language_model.", "model."),), aside=("model.visual.",))
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    """What names begin with in such a folder, and in plain names. The first pair that fits counts."""
    aside: tuple[str, ...] = ()
    """What names of tensors begin with that are no part of the text model (vision tower, projector). Conversions carry
    them along bit for bit."""
    may_lack: tuple[str, ...] = ()
    """The same, of tensors that a folder may be without (those that transformers does not save)."""
    experts: FusedExperts = HALVES
    """How tensors of all experts are laid out, where a folder has them."""
    writes_fused: bool = False
    """An export writes such tensors too: transformers opens the family with no others."""

    def is_aside(self, key: str) -> bool:
        """True for a tensor that is no part of the text model."""
        return key.startswith(self.aside + self.may_lack)

    def plain(self, key: str) -> str:
        """The plain name of a tensor that a folder calls `key`."""
        return key if self.is_aside(key) else _swapped(key, self.prefixes)

    def published(self, key: str) -> str:
        """What a folder calls the tensor of the plain name `key`."""
        return key if self.is_aside(key) else _swapped(key, [pair[::-1] for pair in self.prefixes])


def _swapped(key: str, pairs) -> str:
    for old, new in pairs:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


@dataclass(frozen=True)
class WeightMap:
    """All mappings of one architecture."""

    mappings: tuple[WeightMapping, ...]
    """Templates; each Megatron name must match exactly one."""

    tied: dict[str, str] = field(default_factory=dict)
    """Hugging Face keys that repeat another key where the model shares the two."""

    ignored: tuple[str, ...] = ()
    """Regular expressions of Hugging Face keys that carry no weight of the model (full match)."""

    published: PublishedNames = PublishedNames()
    """What published folders of the family have in place of the plain names above."""

    mtp_layer: int | None = None
    """Hugging Face's number of the head of multi-token prediction; None: no parameter belongs to one."""

    def with_mtp_head(self, layer: int, tied: bool) -> WeightMap:
        """The map of a model that has such a head, which Hugging Face counts as layer `layer`.

        The head's own parameters get mappings; its decoder layer takes those of the decoder. Published folders repeat
        embedding and LM head among its tensors, and loaders of drafting engines want them there. `tied`: the LM head is
        the embedding.
        """
        head = HF.format(layer=layer)
        also = {"model.embed_tokens.weight": [f"{head}embed_tokens.weight"], "lm_head.weight": []}
        also["model.embed_tokens.weight" if tied else "lm_head.weight"].append(
            f"{head}shared_head.head.weight"
        )
        mappings = [
            Repeated(mapping.hf, mapping.mcore, " ".join(also[mapping.hf]))
            if isinstance(mapping, Direct) and also.get(mapping.hf)
            else mapping
            for mapping in self.mappings
        ]
        own = {
            "enorm": "enorm",
            "hnorm": "hnorm",
            "eh_proj": "eh_proj",
            "shared_head.norm": "final_layernorm",
        }
        mappings += [Direct(f"{head}{hf}.weight", f"{MTP}{mcore}.weight") for hf, mcore in own.items()]
        return dataclasses.replace(self, mappings=tuple(mappings), mtp_layer=layer)

    def for_mcore_name(self, name: str) -> WeightMapping:
        """The mapping of one Megatron parameter, wildcards filled in.

        Raises:
            UserError: no mapping knows this name.
        """
        inner = f"{MTP}transformer_layer."
        if self.mtp_layer is not None and name.startswith(inner):
            as_decoder = MC.format(layer=self.mtp_layer) + name.removeprefix(inner)
            mapping = dataclasses.replace(self.for_mcore_name(as_decoder), mcore=name)
            # Loaders count the thresholds of the decoder's layers.
            return (
                dataclasses.replace(mapping, key=MTP_THRESHOLD) if isinstance(mapping, Setting) else mapping
            )
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
                optional = mapping.repeats() if isinstance(mapping, Repeated) else ()
                if key not in left and key not in optional and not isinstance(mapping, Added):
                    missing.append(key)
        unknown = sorted(
            key for key in left - used if not self.is_repeat(key, used) and not self.is_ignored(key)
        )
        if missing or unknown:
            raise UserError(f"{source}: {_what_differs(missing, unknown)}")
        return bound

    def is_repeat(self, key: str, used: Iterable[str]) -> bool:
        """True if `key` only repeats a tied tensor."""
        return key not in used and self.tied.get(key) in used

    def is_ignored(self, key: str) -> bool:
        """True if `key` carries no weight of the model."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)


def _what_differs(missing: list[str], unknown: list[str]) -> str:
    """In words: what is expected, what is there instead, and what that looks like."""
    lost = f"{len(missing)} tensors are missing: {_first(missing)}"
    more = f"{len(unknown)} tensors do not belong to this architecture: {_first(unknown)}"
    if not missing or not unknown:
        return lost if missing else more
    return f"{lost}; {more}{_reason(missing, unknown)}"


def _reason(missing: list[str], unknown: list[str]) -> str:
    merged = next((key for key in unknown if _MERGED.search(key)), None)
    if merged is not None:
        return (
            f" (the experts of a layer are merged into one tensor, e.g. {merged}; here each expert has tensors of "
            "its own, as in published folders: take them apart first)"
        )
    lora = next((key for key in unknown if ".lora_" in key or ".base_layer." in key), None)
    if lora is not None:
        return " (an adapter, LoRA, is not merged: peft's merge_and_unload does it)"
    there, found = set(unknown), _prefixes(missing[0], unknown)
    if found is None:
        return ""
    has, wanted = found
    if sum(has + key.removeprefix(wanted) in there for key in missing) <= len(missing) // 2:
        return ""
    if not has:
        return f" (the names are without the prefix {wanted!r}: save the whole model, with its head)"
    if not wanted:
        return f" (the names have a foreign prefix, {has!r}: rename the tensors without it)"
    return f" (the names have the prefix {has!r} in place of {wanted!r}: rename the tensors)"


def _prefixes(wanted: str, names: list[str]) -> tuple[str, str] | None:
    """The name that has most of its last words in common with `wanted`: what stands before those, in both."""
    words, best, found = wanted.split("."), 1, None
    for name in names:
        theirs = name.split(".")
        common = 0
        while common < min(len(words), len(theirs)) and words[-1 - common] == theirs[-1 - common]:
            common += 1
        if common > best:
            best = common
            cut = sum(map(len, words[len(words) - common :])) + common - 1
            found = name[: len(name) - cut], wanted[: len(wanted) - cut]
    return found


def _first(keys: list[str], limit: int = 3) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


HF = "model.layers.{layer}."
MC = "decoder.layers.{layer}."
MTP = "mtp.layers.0."
"""Megatron's name of the head of multi-token prediction."""
MTP_THRESHOLD = "zce_mtp_threshold"
"""Key of config.json: the threshold of that head's paired zero experts."""
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def decoder(
    moe: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    router: str = "gate",
) -> tuple[WeightMapping, ...]:
    """Everything but attention's projections. The arguments are Hugging Face's words for a layer's MoE block, for the
    three matrices of a gated MLP and for the router."""
    expert = f"{HF}{moe}.experts.{{expert}}."
    local = MC + "mlp.experts.local_experts.{expert}."
    return (
        Direct("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        Direct("model.norm.weight", "decoder.final_layernorm.weight"),
        Direct("lm_head.weight", "output_layer.weight"),
        Direct(HF + "input_layernorm.weight", MC + "input_layernorm.weight"),
        Direct(HF + "self_attn.o_proj.weight", MC + "self_attention.linear_proj.weight"),
        Direct(HF + "post_attention_layernorm.weight", MC + "pre_mlp_layernorm.weight"),
        # MoE layers
        Router(f"{HF}{moe}.{router}.weight", MC + "mlp.router.weight"),
        Added(f"{HF}{moe}.{router}.zero_bias", MC + "mlp.router.zero_output.bias"),
        # paired zero experts
        Added(f"{HF}{moe}.{router}.zero_weight", MC + "mlp.router.paired.weight"),
        Added(f"{HF}{moe}.{router}.zero_bias", MC + "mlp.router.paired.bias"),
        Added(f"{HF}{moe}.{router}.zero_hidden_weight", MC + "mlp.router.paired.hidden_weight"),
        Added(f"{HF}{moe}.{router}.zero_hidden_bias", MC + "mlp.router.paired.hidden_bias"),
        Added(f"{HF}{moe}.{router}.zero_hidden_output", MC + "mlp.router.paired.hidden_output"),
        Added(f"{HF}{moe}.{router}.zero_constant", MC + "mlp.router.zero_output.constant"),
        Added(f"{HF}{moe}.{router}.zero_down", MC + "mlp.router.zero_output.down"),
        Added(f"{HF}{moe}.{router}.zero_up", MC + "mlp.router.zero_output.up"),
        Setting("zce_threshold", "zce_threshold/{layer}", MC + "mlp.router.paired.threshold"),
        GateUp(f"{expert}{gate}.weight", f"{expert}{up}.weight", local + "linear_fc1.weight"),
        Direct(f"{expert}{down}.weight", local + "linear_fc2.weight"),
        # dense layers
        GateUp(f"{HF}mlp.{gate}.weight", f"{HF}mlp.{up}.weight", MC + "mlp.linear_fc1.weight"),
        Direct(f"{HF}mlp.{down}.weight", MC + "mlp.linear_fc2.weight"),
    )


QKV_PROJECTIONS = tuple(
    QKV(
        HF + f"self_attn.q_proj.{kind}",
        HF + f"self_attn.k_proj.{kind}",
        HF + f"self_attn.v_proj.{kind}",
        MC + f"self_attention.linear_qkv.{kind}",
    )
    for kind in ("weight", "bias")
)
"""Grouped-query attention."""

GATED_QKV = GatedQKV(
    HF + "self_attn.q_proj.weight",
    HF + "self_attn.k_proj.weight",
    HF + "self_attn.v_proj.weight",
    MC + "self_attention.linear_qkv.weight",
)
"""The same with an output gate."""


def gated_delta(projections: str, sections: str) -> tuple[WeightMapping, ...]:
    """A gated delta network, whose `linear_attn` has these projections of its input (see `KeyHeads`)."""
    hf, mc = HF + "linear_attn.", MC + "self_attention."
    inputs = " ".join(f"{hf}{name}.weight" for name in projections.split())
    return (
        KeyHeads(inputs, sections, mc + "in_proj.weight"),
        KeyHeads(hf + "conv1d.weight", "k,k,v", mc + "conv_weight"),
        Direct(hf + "A_log", mc + "A_log"),
        Direct(hf + "dt_bias", mc + "dt_bias"),
        Direct(hf + "norm.weight", mc + "norm.weight"),
        Direct(hf + "out_proj.weight", mc + "out_proj.weight"),
    )


QK_NORMS = tuple(
    Direct(HF + f"self_attn.{x}_norm.weight", MC + f"self_attention.{x}_layernorm.weight") for x in "qk"
)
"""Norms of queries and keys."""
LATENT_PROJECTIONS = tuple(
    Direct(f"{HF}self_attn.{hf}.weight", f"{MC}self_attention.{ours}.weight")
    for hf, ours in {
        # The last rows of kv_a_proj_with_mqa are the rotary part of the keys, on both sides.
        "q_proj": "linear_q_proj",
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
    }.items()
)
"""Multi-latent attention."""
SCORE_BIAS = ScoreBias(HF + "mlp.gate.e_score_correction_bias", MC + "mlp.router.expert_bias")
"""The bias that chooses among sigmoid scores."""


def shared_expert(name: str = "shared_experts") -> tuple[WeightMapping, ...]:
    """An expert that every token uses, under Hugging Face's name for it."""
    shared = f"{HF}mlp.{name}."
    return (
        GateUp(
            f"{shared}gate_proj.weight",
            f"{shared}up_proj.weight",
            MC + "mlp.shared_experts.linear_fc1.weight",
        ),
        Direct(f"{shared}down_proj.weight", MC + "mlp.shared_experts.linear_fc2.weight"),
    )


GATED_SHARED_EXPERT = (
    *shared_expert("shared_expert"),
    Direct(HF + "mlp.shared_expert_gate.weight", MC + "mlp.shared_experts.gate_weight"),
)
"""The same behind a gate of one number."""
