"""The gated delta layer against transformers' (fp32, bf16, gradients), on packed and padded rows, token by token, and
with its heads on two ranks."""

import os

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from families import FAMILIES
from megatron.core.packed_seq_params import PackedSeqParams
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from zeda_megatron.config.parallel import ParallelConfig
from zeda_megatron.distill.kv_slots import SlotContext
from zeda_megatron.errors import UserError
from zeda_megatron.models.architecture import dims_of, read_architecture, weight_map_of
from zeda_megatron.models.build import check_layout, transformer_config
from zeda_megatron.models.gated_delta import GatedDeltaNet
from zeda_megatron.runtime.process_groups import initialize

pytestmark = pytest.mark.usefixtures("one_process")
FAMILY = FAMILIES["qwen3_next"]
NAME = "decoder.layers.0.self_attention."
SIZES = {"one value head": {"linear_num_value_heads": 2}, "three of each": {}}


def theirs_and_reader(seed=0, **changes):
    """transformers' layer, every weight drawn, and what reads its tensors."""
    config = FAMILY.make(**{"rms_norm_eps": 1e-6} | changes).config
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    tiny.draw(theirs, seed)
    arch = read_architecture(config.to_dict() | {"architectures": [FAMILY.architecture]})
    tensors = {f"model.layers.0.linear_attn.{name}": tensor for name, tensor in theirs.state_dict().items()}
    return theirs, arch, tensors


def layer(arch, tensors, dtype=torch.float32, ranks=1, rank=0):
    """Ours, or a rank's part of it, with those weights."""
    config = transformer_config(arch, ParallelConfig(tensor_model_parallel_size=ranks), dtype)
    made = GatedDeltaNet(config, 1)
    weights, dims = weight_map_of(arch), dims_of(arch)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            cut = getattr(parameter, "partition_dim", -1) if name != "norm.weight" else -1
            shape = list(parameter.shape)
            if cut >= 0:
                shape[cut] *= ranks
            mapping = weights.for_mcore_name(NAME + name)
            whole = mapping.to_mcore(tensors.__getitem__, tuple(shape), dims)
            parameter.copy_(whole.chunk(ranks, cut)[rank] if cut >= 0 else whole)
    return made


def hidden(*shape, seed=1):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def run(ours, hidden_BSH, mask=None, **kwargs):
    return ours(hidden_BSH.transpose(0, 1), mask, **kwargs)[0].transpose(0, 1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("length", [1, 3, 21, 70])  # shorter than the convolution, more than one chunk of 64
def test_outputs_and_gradients_equal_transformers(sizes, length):
    theirs, arch, tensors = theirs_and_reader(**SIZES[sizes])
    ours, dims = layer(arch, tensors), dims_of(arch)
    x, y = (hidden(2, length).requires_grad_() for _ in range(2))
    weights = hidden(2, length, seed=2)
    made, expected = run(ours, x), theirs(y)
    tiny.close(made, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1
    (made * weights).sum().backward()
    (expected * weights).sum().backward()
    tiny.close(x.grad, y.grad, rtol=0, atol=1e-5)
    gradients = {f"model.layers.0.linear_attn.{n}": p.grad for n, p in theirs.named_parameters()}
    seen = set()
    for name, parameter in ours.named_parameters():
        for key, mine in weight_map_of(arch).for_mcore_name(NAME + name).to_hf(parameter.grad, dims).items():
            tiny.close(mine, gradients[key], rtol=0, atol=1e-5, msg=key)
            seen.add(key)
    assert seen == set(gradients)


def test_bf16_equals_transformers():
    theirs, arch, tensors = theirs_and_reader()
    ours = layer(arch, tensors, torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    x = hidden(2, 21).bfloat16()
    # Products are summed in another order: a unit in the last place of bf16.
    tiny.close(run(ours, x), theirs.bfloat16()(x), rtol=0, atol=2**-7)


@torch.no_grad()
def test_packed_sequences_equal_each_alone():
    _, arch, tensors = theirs_and_reader()
    ours = layer(arch, tensors)
    parts = [hidden(1, length, seed=length) for length in (9, 1, 67, 2)]
    ends = torch.tensor([0, 9, 10, 77, 79], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=67, max_seqlen_kv=67)
    made = run(ours, torch.cat(parts, dim=1), packed_seq_params=packed)
    tiny.close(made, torch.cat([run(ours, x) for x in parts], dim=1), rtol=0, atol=1e-5)
    assert tiny.gap(made, run(ours, torch.cat(parts, dim=1))) > 0.01  # states would go on otherwise


@torch.no_grad()
def test_a_padded_prompt_and_tokens_one_by_one_equal_the_whole_sequence():
    _, arch, tensors = theirs_and_reader()
    ours = layer(arch, tensors)
    rows = [hidden(1, length + 5, seed=length) for length in (8, 2)]
    wanted = [run(ours, x) for x in rows]
    padded = torch.cat([rows[0][:, :8], torch.cat([hidden(1, 6, seed=9), rows[1][:, :2]], dim=1)])
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    mask[1, :, :, :6] = True
    context = SlotContext(2, 8)
    made = run(ours, padded, mask, inference_context=context)
    tiny.close(made[0], wanted[0][0, :8], rtol=0, atol=1e-5)
    tiny.close(made[1, 6:], wanted[1][0, :2], rtol=0, atol=1e-5)
    for step in range(5):
        token = torch.cat([rows[0][:, 8 + step : 9 + step], rows[1][:, 2 + step : 3 + step]])
        made = run(ours, token, inference_context=context)
        expected = torch.cat([wanted[0][:, 8 + step : 9 + step], wanted[1][:, 2 + step : 3 + step]])
        tiny.close(made, expected, rtol=0, atol=1e-5, msg=step)


def test_context_parallelism_and_heads_that_do_not_divide_are_refused():
    _, arch, _ = theirs_and_reader()
    with pytest.raises(UserError, match=r"--context-parallel-size 2: .* linear attention"):
        check_layout(arch, ParallelConfig(context_parallel_size=2))
    odd = theirs_and_reader(linear_num_key_heads=3, linear_num_value_heads=3)[1]
    with pytest.raises(UserError, match="does not divide the model's 3 key heads of linear attention"):
        check_layout(odd, ParallelConfig(tensor_model_parallel_size=2))


def test_a_new_layer_decays_as_transformers_draws_it():
    arch = theirs_and_reader()[1]
    made = GatedDeltaNet(transformer_config(arch), 1)
    assert made.A_log.exp().min() >= 0.01 and made.A_log.exp().max() <= 16.0 and made.A_log.std() > 0
    assert torch.equal(made.dt_bias, torch.ones(6)) and torch.equal(made.norm.weight, torch.ones(6))


def on_one_of_two_ranks(rank: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    initialize(ParallelConfig(tensor_model_parallel_size=2))
    _, arch, tensors = theirs_and_reader()
    ours = layer(arch, tensors, ranks=2, rank=rank)
    # Sequence parallelism: each rank has half of the tokens.
    whole = hidden(1, 22).transpose(0, 1)
    mine = whole.chunk(2)[rank].clone().requires_grad_()
    ends = torch.tensor([0, 9, 22], dtype=torch.int32)
    made = ours(mine, None, packed_seq_params=PackedSeqParams("thd", ends, ends))[0]
    (made * hidden(1, 22, seed=2).transpose(0, 1).chunk(2)[rank]).sum().backward()
    assert ours.norm.weight.sequence_parallel
    torch.distributed.all_reduce(ours.norm.weight.grad)  # as Megatron does for such weights
    described = ours.sharded_state_dict("x.")
    facts = {
        k: (t.global_shape, t.global_offset, t.replica_id) for k, t in described.items() if hasattr(t, "data")
    }
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.save((made.detach(), mine.grad, gradients, facts), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_heads_on_two_ranks_equal_one_process(tmp_path):
    mp.spawn(on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    _, arch, tensors = theirs_and_reader()
    ours = layer(arch, tensors)
    x = hidden(1, 22).transpose(0, 1).requires_grad_()
    ends = torch.tensor([0, 9, 22], dtype=torch.int32)
    made = ours(x, None, packed_seq_params=PackedSeqParams("thd", ends, ends))[0]
    (made * hidden(1, 22, seed=2).transpose(0, 1)).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    tiny.close(torch.cat([part[0] for part in parts]), made, rtol=0, atol=1e-5)
    tiny.close(torch.cat([part[1] for part in parts]), x.grad, rtol=0, atol=1e-5)
    for name, parameter in ours.named_parameters():
        whole, cut = name == "norm.weight", int(name == "out_proj.weight")
        found = parts[1][2][name] if whole else torch.cat([part[2][name] for part in parts], dim=cut)
        tiny.close(found, parameter.grad, rtol=0, atol=1e-5, msg=name)
        for rank in range(2):
            shape, offset, replica = parts[rank][3][f"x.{name}"]
            assert tuple(shape) == parameter.shape, name
            assert offset[cut] == (0 if whole else rank * parameter.shape[cut] // 2), name
            assert replica[1] == (rank if whole else 0), name
