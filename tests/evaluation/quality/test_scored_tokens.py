"""What is read off every scored token, against the plain way."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeda_megatron.data.packing import PackedDataset, TokenSample
from zeda_megatron.evaluation.quality.scored_tokens import ScoredTokens, next_token_scores, response_positions

SAMPLES = [
    TokenSample([5, 6, 7, 8, 9], [False, False, True, True, True]),
    TokenSample([1, 2, 3, 4, 5, 6, 7], [False, True, True, False, False, True, True]),
    TokenSample([3, 4], [False, True]),
]


class Zeros:
    """Stands for `TokenClasses`."""

    def of_row(self, tokens_S, position_ids_S):
        return torch.zeros_like(tokens_S)


def rows(seq_length=16):
    packed = PackedDataset(SAMPLES, seq_length, pad_id=0, seed=3)
    return [(packed[i], packed.row_samples(i)) for i in range(packed.rows_in_epoch(0))]


@pytest.mark.parametrize("seq_length", [16, 7])
def test_positions_count_from_the_responses_begin_in_packed_rows(seq_length):
    for row, samples in rows(seq_length):
        expected = []
        for sample in (SAMPLES[i] for i in samples):
            index = -1
            for response in sample.is_response:
                index = index + 1 if response else -1
                if response:
                    expected.append(index)
        mask_S = row.loss_mask[0]
        assert response_positions(mask_S)[mask_S > 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_and_log_prob_equal_those_of_log_softmax(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(13, 6, generator=draw, dtype=dtype)
    head_VH = torch.randn(50, 6, generator=draw, dtype=dtype) * torch.tensor([[40.0], [0.1]]).repeat(25, 1)
    labels_T = torch.randint(0, 50, (13,), generator=draw)
    expected_TV = torch.log_softmax((hidden_TH @ head_VH.t()).double(), dim=1)
    entropy_T = -(expected_TV.exp() * expected_TV).sum(1)
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for chunk in (1, 4, 100):
        log_p_T, found_T = next_token_scores(hidden_TH, head_VH, labels_T, chunk)
        assert log_p_T.dtype == found_T.dtype == dtype
        expected_T = expected_TV.gather(1, labels_T[:, None])[:, 0]
        torch.testing.assert_close(log_p_T.double(), expected_T, **tolerance)
        torch.testing.assert_close(found_T.double(), entropy_T, **tolerance)


def test_no_tensor_of_tokens_times_vocabulary_exists():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (list, tuple)) else [made]:
                if torch.is_tensor(tensor):
                    self.numbers = max(
                        self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size()
                    )
            return made

    hidden_TH, head_VH = torch.randn(64, 4), torch.randn(300, 4)
    with Largest() as seen:
        next_token_scores(hidden_TH, head_VH, torch.zeros(64, dtype=torch.int64), chunk_tokens=8)
    assert seen.numbers == 8 * 300


def test_only_scored_tokens_are_read_and_padding_of_the_heads_plays_no_part():
    ((row, _),) = rows()
    draw = torch.Generator().manual_seed(1)
    student, teacher = (
        (torch.randn(16, 1, 6, generator=draw), torch.randn(12, 6, generator=draw)) for _ in range(2)
    )
    for _, head_VH in (student, teacher):
        head_VH[10:] = 50.0  # would swallow the distribution
    skipped_S = torch.rand(16, generator=draw).double()
    found = ScoredTokens.of_row(row, skipped_S, student, teacher, 10, Zeros())
    scored_S = row.loss_mask[0] > 0
    labels_T = row.labels[0][scored_S]
    log_p_TV, log_q_TV = (
        torch.log_softmax((hidden[:, 0] @ head[:10].t()).double(), 1)[scored_S]
        for hidden, head in (student, teacher)
    )
    index = (torch.arange(len(labels_T)), labels_T)
    assert len(found) == int(scored_S.sum()) == 8
    assert torch.equal(found.skipped_T, skipped_S[scored_S])
    tiny.close(found.gap_T, (log_p_TV[index] - log_q_TV[index]).abs(), rtol=1e-4, atol=1e-5)
    tiny.close(found.entropy_T, -(log_q_TV.exp() * log_q_TV).sum(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(ScoredTokens.join([found, found]).gap_T, torch.cat([found.gap_T] * 2))
