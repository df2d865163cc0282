"""Zero experts in a Megatron-Core training loop of your own: python examples/own_loop.py [--steps N].

A small random model learns to repeat tokens, on a CPU or a GPU. One process: with several, wrap the model in Megatron's
DistributedDataParallel as ever; the zero experts change nothing there, expert parallelism included.
"""

import argparse

import zeda_megatron as zm

zero = zm.ZeroExpertConfig(num_zero_experts=4, group_loss_coeff=0.1)  # a share of 2*4 / (8 + 2*4) = 1/2
apply_zero_experts = zm.apply_zero_experts  # on a CPU this makes Megatron run there: before its imports

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402


def main(steps: int) -> tuple[float, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, add_bias_linear=False,
        num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=32, gated_linear_unit=True,
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    spec = apply_zero_experts(get_gpt_layer_local_spec(num_experts=8, normalization="RMSNorm"), zero)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=32).to(device)
    zm.install_dispatchers(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(32, device=device)[None].expand(8, -1)
    for step in range(steps):
        tokens = (
            torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(step)).repeat(1, 2).to(device)
        )
        loss = model(tokens, positions, None, labels=tokens.roll(-1, 1))[:, 16:-1].mean()
        loss.backward()  # the group loss joins here, through the router
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            share = zm.zero_share(model)
            print(f"step {step}: loss {loss.item():.3f}, zero share {share:.2f}", flush=True)
    torch.distributed.destroy_process_group()
    return loss.item(), share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=101)
    main(parser.parse_args().steps)
