"""The distillation loss in Megatron's layouts: token order, tensor and sequence parallelism, user errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from zeda_megatron.config.run import LOSS_KINDS, LossConfig
from zeda_megatron.distill.losses import distill_loss
from zeda_megatron.errors import UserError
from zeda_megatron.ops.vocab_kl import LossInputs

RANKS, SEQUENCE, BATCH, HIDDEN, VOCAB, TRUE_VOCAB = 2, 6, 3, 8, 24, 21


def inputs():
    """Student and teacher (hidden_SBH, head_VH), labels_BS, mask_BS."""
    torch.manual_seed(3)
    shapes = ((SEQUENCE, BATCH, HIDDEN), (VOCAB, HIDDEN)) * 2
    student_SBH, student_VH, teacher_SBH, teacher_VH = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    labels_BS = torch.randint(0, TRUE_VOCAB, (BATCH, SEQUENCE))
    mask_BS = (torch.rand(BATCH, SEQUENCE) > 0.4).float()
    return (
        student_SBH.requires_grad_(),
        student_VH.requires_grad_(),
        teacher_SBH,
        teacher_VH,
        labels_BS,
        mask_BS,
    )


def test_hidden_states_meet_the_labels_of_their_own_token():
    student_SBH, student_VH, _, _, labels_BS, mask_BS = inputs()
    given = LossInputs(student_SBH, student_VH, None, None, labels_BS, mask_BS)
    loss, metrics = distill_loss(given, LossConfig("ce"))
    logits_BSV = (student_SBH @ student_VH.t()).transpose(0, 1)
    expected_BS = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    torch.testing.assert_close(loss, (expected_BS.view(BATCH, SEQUENCE) * mask_BS).sum())
    assert metrics["weight"] == mask_BS.sum()
    ours = torch.autograd.grad(loss, (student_SBH, student_VH))
    theirs = torch.autograd.grad((expected_BS * mask_BS.flatten()).sum(), (student_SBH, student_VH))
    torch.testing.assert_close(ours, theirs)


def test_the_config_reaches_the_loss():
    *tensors, labels_BS, mask_BS = inputs()
    config = LossConfig("jsd", beta=0.2, temperature=1.5, chunk_tokens=4)
    loss, _ = distill_loss(LossInputs(*tensors, labels_BS, mask_BS), config, vocab_size=TRUE_VOCAB)
    p, q = (
        F.softmax(tensors[i] @ tensors[i + 1][:TRUE_VOCAB].t() / 1.5, dim=-1).transpose(0, 1) for i in (0, 2)
    )
    m = 0.2 * q + 0.8 * p
    jsd_BS = (0.2 * q * (q / m).log() + 0.8 * p * (p / m).log()).sum(-1)
    torch.testing.assert_close(loss, (jsd_BS * mask_BS).sum())


def test_the_teacher_gets_no_gradient():
    *tensors, labels_BS, mask_BS = inputs()
    tensors[2].requires_grad_()
    tensors[3].requires_grad_()
    distill_loss(LossInputs(*tensors, labels_BS, mask_BS), LossConfig("forward_kl"))[0].backward()
    assert tensors[2].grad is None and tensors[3].grad is None and tensors[0].grad.any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "kl"}, ["--distill-loss 'kl'", *LOSS_KINDS]),
        ({"kind": "jsd", "beta": 0.0}, ["--distill-beta 0.0", "forward_kl"]),
        ({"temperature": -1.0}, ["--distill-temperature -1.0"]),
        ({"temperature": float("nan")}, ["--distill-temperature nan"]),
        ({"chunk_tokens": 0}, ["--loss-chunk-tokens 0"]),
    ],
)
def test_senseless_settings_are_user_errors_that_name_the_flag(values, words):
    with pytest.raises(UserError) as caught:
        LossConfig(**values)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_missing_teacher_is_a_user_error():
    student_SBH, student_VH, _, _, labels_BS, mask_BS = inputs()
    given = LossInputs(student_SBH, student_VH, None, None, labels_BS, mask_BS)
    with pytest.raises(UserError, match="needs a teacher"):
        distill_loss(given, LossConfig("reverse_kl"))


def test_one_process_needs_no_megatron():
    code = (
        "import sys, torch; from zeda_megatron.distill.losses import *;"
        "x, w = torch.ones(2, 1, 4), torch.ones(5, 4); labels = torch.zeros(1, 2, dtype=torch.long);"
        "distill_loss(LossInputs(x, w, x, w, labels, torch.ones(1, 2)), LossConfig());"
        "sys.exit(any(name.startswith('megatron') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    from zeda_megatron.runtime import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    group = parallel_state.get_tensor_model_parallel_group()
    student_SBH, student_VH, teacher_SBH, teacher_VH, labels_BS, mask_BS = inputs()
    rows = slice(rank * VOCAB // RANKS, (rank + 1) * VOCAB // RANKS)
    for sequence_parallel in (False, True):
        part = (
            slice(rank * SEQUENCE // RANKS, (rank + 1) * SEQUENCE // RANKS)
            if sequence_parallel
            else slice(None)
        )
        for kind in LOSS_KINDS:
            config = LossConfig(kind, temperature=1.3, chunk_tokens=5)
            every = LossInputs(student_SBH, student_VH, teacher_SBH, teacher_VH, labels_BS, mask_BS)
            whole, whole_metrics = distill_loss(every, config)
            whole_grads = torch.autograd.grad(whole, (student_SBH, student_VH))
            mine_SBH = student_SBH[part].detach().clone().requires_grad_()
            mine_VH = student_VH[rows].detach().clone().requires_grad_()
            mine = LossInputs(mine_SBH, mine_VH, teacher_SBH[part], teacher_VH[rows], labels_BS, mask_BS)
            split, metrics = distill_loss(mine, config, group, sequence_parallel)
            grads = torch.autograd.grad(split, (mine_SBH, mine_VH))
            torch.testing.assert_close((split, metrics), (whole, whole_metrics), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[0], whole_grads[0][part], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads[1], whole_grads[1][rows], rtol=1e-12, atol=1e-12)

    # Megatron's own vocabulary-parallel cross entropy, which works on full logits.
    logits_SBV = (student_SBH @ student_VH[rows].t()).float()
    theirs_SB = vocab_parallel_cross_entropy(logits_SBV, labels_BS.t().contiguous())
    mine = LossInputs(student_SBH, student_VH[rows], None, None, labels_BS, mask_BS)
    ours, _ = distill_loss(mine, LossConfig("ce"), tp_group=group)
    tiny.close(ours.float(), (theirs_SB * mask_BS.t()).sum(), rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()
    # Not the interpreter's own exit: there gloo's threads may still let go of a tensor, which aborts the process
    # (https://github.com/pytorch/pytorch/pull/179291). A failed check has raised before.
    os._exit(0)


def test_tensor_and_sequence_parallel_equal_one_process(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)
