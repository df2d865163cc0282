"""MoE layers that compute the real slots only, and the model around them; travels with checkpoints."""

import torch
from torch import nn

from .zero_expert_routing import batch_margin, number, paired_shapes, zero_experts


class ZeroExpertMoeBlock(nn.Module):
    """MoE layer that computes the real slots only. Takes over the stock block's experts, shared one included.

    Router and experts are called as modules and their attributes are never read: tools that hook or wrap modules
    (offloading, adapters, sharding, quantised experts) meet what they would meet in the stock block.

    Attributes:
        static_shapes: never ask the device how many slots are real (CUDA graphs, torch.compile). Zero slots are then
            moved, and left out of the products where transformers can (`_may_leave_out`).
    """

    ROUTER_NAME = "gate"
    """The stock block's name of its router."""

    def __init__(self, stock, router):
        super().__init__()
        self.add_module(self.ROUTER_NAME, router)
        self.experts = stock.experts
        self.take_over(stock)
        self.num_real, self.dials = router.num_real, router.dials
        self.static_shapes, self.token_mask_BS = False, None
        self.reset_counts()

    def take_over(self, stock) -> None:
        """Keep what else the stock block has."""
        self.shared_experts = getattr(stock, "shared_experts", None)

    @property
    def routing(self):
        """The router, whatever the stock block calls it."""
        return self._modules[self.ROUTER_NAME]

    def route(self, hidden_TH):
        """What the router gives."""
        return self.routing(hidden_TH)

    def shared(self, hidden_BSH):
        """What an expert that every token uses adds, or None."""
        return None if self.shared_experts is None else self.shared_experts(hidden_BSH)

    def reset_counts(self):
        self.zero_slots, self.all_slots = 0, 0

    def forward(self, hidden_BSH):
        """[B, S, H] -> [B, S, H]."""
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        _, weights_TK, ids_TK, answer_TH = self.route(hidden_TH)
        if self.dials.masked:
            output_TH = self.experts(hidden_TH, ids_TK, weights_TK)
        elif self.static_shapes or _shapes_must_be_static():
            output_TH = self._all_slots(hidden_TH, weights_TK, ids_TK)
        else:
            self._count(ids_TK >= self.num_real, hidden_BSH.shape)
            output_TH = self._real_slots(hidden_TH, weights_TK, ids_TK)
        if answer_TH is not None:
            output_TH = (output_TH + answer_TH).to(hidden_TH.dtype)
        output_BSH, shared_BSH = output_TH.view_as(hidden_BSH), self.shared(hidden_BSH)
        return output_BSH if shared_BSH is None else output_BSH + shared_BSH

    def _real_slots(self, hidden_TH, weights_TK, ids_TK):
        """Real slots become rows of one pick each; a token's rows are added up as the stock experts do."""
        tokens, top_k = ids_TK.shape
        slot_R = (ids_TK.reshape(-1) < self.num_real).nonzero().squeeze(1)
        if slot_R.numel() == ids_TK.numel():
            return self.experts(hidden_TH, ids_TK, weights_TK)
        ids_R, weights_R = ids_TK.reshape(-1)[slot_R], weights_TK.reshape(-1)[slot_R]
        if slot_R.numel() == 0:
            if not (torch.is_grad_enabled() or _is_distributed()):
                return torch.zeros_like(hidden_TH)
            # Another rank may wait in the experts, and every parameter has a gradient: one row of weight 0.
            slot_R = ids_R = slot_R.new_zeros(1)
            weights_R = weights_TK[:1, 0] * 0
        rows_RH = self.experts(hidden_TH[slot_R // top_k], ids_R.unsqueeze(1), weights_R.unsqueeze(1))
        slots_SH = rows_RH.new_zeros(tokens * top_k, rows_RH.shape[1]).index_copy_(0, slot_R, rows_RH)
        return slots_SH.view(tokens, top_k, -1).sum(dim=1)

    def _all_slots(self, hidden_TH, weights_TK, ids_TK):
        """Every slot goes to the experts, zero slots with weight 0."""
        zero_TK = ids_TK >= self.num_real
        if self._may_leave_out():
            ids_TK = ids_TK.clamp(max=self.num_real)
        else:  # an expert that the token has picked anyway: no further weights are read
            picked_T1 = ids_TK.clamp(max=self.num_real).amin(dim=-1, keepdim=True) % self.num_real
            ids_TK = torch.where(zero_TK, picked_T1, ids_TK)
        return self.experts(hidden_TH, ids_TK, weights_TK.masked_fill(zero_TK, 0))

    def _may_leave_out(self):
        """transformers' products leave out slots of the id N (those of other ranks' experts are marked so) if told to.

        Not where the experts really are split over ranks: there N is some rank's business. Versions before this flag
        have no way that all their products share.
        """
        if not hasattr(self.experts, "_is_expert_parallel"):
            return False
        if getattr(self.experts, "num_experts", None) != self.num_real:
            return False
        self.experts._is_expert_parallel = True
        return True

    def _count(self, zero_TK, shape):
        mask = self.token_mask_BS
        if mask is not None and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            token_T = mask[:, -shape[1] :].reshape(-1).to(zero_TK.device).bool()
            self.zero_slots = self.zero_slots + (zero_TK & token_T.unsqueeze(-1)).sum()
            self.all_slots = self.all_slots + token_T.sum() * zero_TK.shape[1]
        else:
            self.zero_slots = self.zero_slots + zero_TK.sum()
            self.all_slots = self.all_slots + zero_TK.numel()


class GatedSharedBlock(ZeroExpertMoeBlock):
    """A MoE block whose shared expert has a gate."""

    def take_over(self, stock):
        self.shared_expert, self.shared_expert_gate = stock.shared_expert, stock.shared_expert_gate

    def shared(self, hidden_BSH):
        return self.shared_expert_gate(hidden_BSH).sigmoid() * self.shared_expert(hidden_BSH)


class ZeroDialByPhase:
    """Sets every sequence's dial by the phase that it is in, before its next token is fed."""

    def __init__(self, model, begin, end, inside, outside):
        self.model, self.begin, self.end = model, begin, end
        self.inside, self.outside = inside, outside
        model.set_zero_dials(None)  # a prompt is read under the model's own dial

    def __call__(self, input_ids, scores):
        """[B, T] so far -> the scores as they are."""
        place_T = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        begun_B, ended_B = ((place_T * (input_ids == token)).amax(dim=1) for token in (self.begin, self.end))
        self.model.set_zero_dials(torch.where(begun_B > ended_B, self.inside, self.outside))
        return scores


def _shapes_must_be_static():
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _is_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _packed_by(config):
    """Who packed the weights: the scales of these formats' experts are none that transformers reads."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) or found is None else found.to_dict()
    name = str((found or {}).get("quant_method", ""))
    return name if name in ("compressed-tensors", "modelopt") else None


class CarriesHeads:
    """Goes before `ZeroExpertModel`: tensors of multi-token-prediction layers in a folder are no surprise."""

    def __init__(self, config):
        super().__init__(config)
        layers, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
        ignored = {rf"model\.layers\.{layers + i}\..*" for i in range(more)}
        self._keys_to_ignore_on_load_unexpected = ignored | set(self._keys_to_ignore_on_load_unexpected or ())


class ZeroExpertModel:
    """Goes before a stock `...ForCausalLM` among the bases of a class, which names the three below."""

    MOE_BLOCK: type
    """The stock MoE block that is replaced."""
    BLOCK: type = ZeroExpertMoeBlock
    """What replaces it."""
    ROUTER: type
    """Router with zero experts, built from the config."""
    NUM_EXPERTS: str
    """Config key of N."""
    ROUTER_DRAWN_BY_BLOCK = False
    """Stock code draws a router by the class of its block, which ours does not have: it is drawn here."""
    _auto_class = "AutoModelForCausalLM"
    """`save_pretrained` brings these files (transformers 5.0 asks for it, as the model type is a native one)."""

    def __init__(self, config):
        text = config.get_text_config()
        zero = zero_experts(text, getattr(text, self.NUM_EXPERTS))
        if _packed_by(config):
            raise ValueError(
                f"config.json: quantization_config of {_packed_by(config)}: transformers would take packed weights for "
                "plain ones; open the folder with zeda_megatron.serving.load.load_model"
            )
        super().__init__(config)
        self._columns(getattr(text, "use_zce_mask", False))
        for layer in self.decoder.layers:
            if isinstance(layer.mlp, self.MOE_BLOCK):
                layer.mlp = self.BLOCK(layer.mlp, self.ROUTER(text))
                if zero.terms is not None:
                    layer.post_attention_layernorm.register_forward_pre_hook(layer.mlp.routing.see_residual)
        self.init_weights()  # of the new routers; the rest has been drawn
        if "ep_router" in (getattr(self, "_ep_plan", None) or {}).values():
            # Expert parallelism before it dispatched tokens takes ids from N on for another rank's experts: without a
            # plan transformers refuses it in words.
            self._ep_plan = {}
        self.decoder.register_forward_pre_hook(self._pass_padding_mask, with_kwargs=True)
        if zero.terms is not None:
            self.set_zero_threshold(getattr(text, "zce_threshold", None))
            if getattr(text, "zce_batch_margin", None):
                self.set_zero_batch_margin(text.zce_batch_margin)
        elif getattr(text, "zce_logit_bias", None) is not None:
            self.set_zero_logit_bias(text.zce_logit_bias)

    @property
    def decoder(self):
        """The stack of layers, which a model that sees has inside."""
        return getattr(self.model, "language_model", self.model)

    @property
    def text_config(self):
        """Settings of the language model, the zero experts' among them."""
        return self.config.get_text_config()

    @torch.no_grad()
    def initialize_weights(self):
        """Called by `from_pretrained`: what the checkpoint lacks is unset memory, of which stock code knows nothing."""
        new = [b for b in self.moe_blocks() if not getattr(b.routing, "_is_hf_initialized", False)]
        super().initialize_weights()
        for block in new:
            names = ("zero_weight", "zero_bias", *paired_shapes(block.routing.zero, 0))
            ours = [getattr(block.routing, name, None) for name in names]
            ours.append(getattr(block, "e_score_correction_bias", None))
            for tensor in ours:
                if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                    tensor.zero_()
            weight = block.routing.weight
            if self.ROUTER_DRAWN_BY_BLOCK and not getattr(weight, "_is_hf_initialized", False):
                weight.normal_(std=self.text_config.initializer_range)

    def moe_blocks(self) -> list[ZeroExpertMoeBlock]:
        """MoE blocks in layer order (dense layers have none)."""
        return [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, ZeroExpertMoeBlock)]

    def _zero(self):
        return zero_experts(self.text_config, getattr(self.text_config, self.NUM_EXPERTS))

    def _columns(self, masked: bool) -> None:
        """Tell the stock load-balancing loss, where there is one, how many columns router logits have."""
        if hasattr(self, "num_experts"):
            self.num_experts = getattr(self.text_config, self.NUM_EXPERTS) + (
                0 if masked else self._zero().rows
            )

    def _pass_padding_mask(self, module, args, kwargs):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2
        for block in self.moe_blocks():
            block.token_mask_BS = mask if usable else None

    def set_zero_mask(self, on: bool) -> None:
        """True: route over the real experts only, as the static model does."""
        for block in self.moe_blocks():
            block.dials.masked = on
        self._columns(on)

    def set_zero_threshold(self, value) -> None:
        """Compute dial of paired routing: skip picks whose score is below `value`, a number or one per MoE layer.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        blocks = self.moe_blocks()
        if self._zero().terms is None:
            raise ValueError("this model's zero experts are shared: use set_zero_logit_bias")
        if value is None:
            raise ValueError(
                "config.json has no zce_threshold: paired routing needs a number, or one per MoE layer"
            )
        if isinstance(value, (list, tuple)):
            kept = values = [number("zce_threshold", v) for v in value]
        else:
            kept = number("zce_threshold", value)
            values = [kept] * len(blocks)
        if len(values) != len(blocks):
            raise ValueError(f"zce_threshold {value} has {len(values)} numbers for {len(blocks)} MoE layers")
        for block, threshold in zip(blocks, values):
            block.dials.threshold = threshold
        self.text_config.zce_threshold = kept

    def set_zero_logit_bias(self, value: float) -> None:
        """Compute dial of shared routing: add `value` to the logits of the zero experts.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        if self._zero().terms is not None:
            raise ValueError("this model's zero experts are paired: use set_zero_threshold")
        value = number("zce_logit_bias", value)
        for block in self.moe_blocks():
            block.dials.logit_bias = value
        self.text_config.zce_logit_bias = value

    def set_zero_batch_margin(self, value: float) -> None:
        """Paired routing: picks nearer than `value` to the threshold prefer experts that the pass reads anyway
        (`kept_picks`); 0 switches it off. An answer then depends on the batch that it is made in.

        config.json of a later `save_pretrained` has it too. `ValueError` if it does not fit the model.
        """
        if self._zero().terms is None:
            raise ValueError(
                "zce_batch_margin: this model's zero experts are shared, paired ones alone have it"
            )
        value = batch_margin(value)
        for block in self.moe_blocks():
            block.dials.batch_margin = value
        self.text_config.zce_batch_margin = value

    def set_zero_dials(self, more) -> None:
        """A dial by request: one number for each sequence of the batches that follow, added to the dial; None: none.

        More skips more, for paired zero experts and shared ones. `ValueError` for a batch of other sequences.
        """
        device = self.decoder.embed_tokens.weight.device
        more_B = (
            None if more is None else torch.as_tensor(more, dtype=torch.float32, device=device).reshape(-1)
        )
        for block in self.moe_blocks():
            block.dials.more_B = more_B

    def zero_dial_by_phase(self, begin: int, end: int, inside: float, outside: float = 0.0):
        """A logits processor for `generate`: after the token `begin` ("<think>") up to and with `end` ("</think>")
        `inside` is added to the dial, elsewhere `outside`. Afterwards `set_zero_dials(None)`.

            model.generate(**inputs, logits_processor=[model.zero_dial_by_phase(151667, 151668, inside=0.7)])
        """
        return ZeroDialByPhase(self, begin, end, inside, outside)

    def zero_share(self) -> list[float]:
        """Per MoE layer: slots that chose a zero expert / all slots, padding excluded, since the last reset.

        0.0 where nothing was counted (mask on, CUDA graph, torch.compile).
        """
        return [int(block.zero_slots) / max(int(block.all_slots), 1) for block in self.moe_blocks()]

    def reset_zero_share(self) -> None:
        """Start counting anew."""
        for block in self.moe_blocks():
            block.reset_counts()
