"""What is read off every scored token, against the plain way."""

import pytest
import sentencepiece
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeda_megatron.data.packing import PackedDataset, TokenSample
from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.evaluation.quality.scored_tokens import (
    CLASSES,
    ScoredTokens,
    TokenClasses,
    next_token_scores,
    response_positions,
)


class Words:
    """A tokenizer of whole pieces, by their place in a list; `<x>` is a marker."""

    def __init__(self, *pieces: str):
        self.pieces = ["a", *pieces]

    def encode(self, text):
        return [self.pieces.index(text)]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(p for p in (self.pieces[i] for i in ids) if not (skip_special_tokens and p == "<x>"))


def classes_of(tokenizer, ids, positions=None) -> list[str]:
    ids = torch.tensor(ids)
    positions = torch.arange(len(ids)) if positions is None else torch.tensor(positions)
    return [CLASSES[i] for i in TokenClasses(tokenizer).of_row(ids, positions).tolist()]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("7", "digits"),
        (" 12", "digits"),
        ("²", "digits"),
        (" the", "letters_begin"),
        ("ing", "letters_inside"),
        ("é", "letters_inside"),
        ("'s", "punctuation"),
        (" +", "punctuation"),
        ("\n        ", "whitespace"),
        ("\n\n", "whitespace"),
        ("\ufffd", "other"),
        ("<x>", "other"),
        ("\x00", "other"),
    ],
)
def test_the_first_character_that_is_no_space_decides(piece, expected):
    assert classes_of(Words(piece), [0, 1])[1] == expected


def test_a_word_goes_on_only_behind_a_letter_of_its_own_sequence():
    tokenizer = Words("foo", "(", " ", "9", "b\u0301")
    ids = [1, 1, 2, 1, 3, 1, 4, 1, 5, 1]
    begin, inside = "letters_begin", "letters_inside"
    found = classes_of(tokenizer, ids)
    assert [c for c in found if c.startswith("letters")] == [
        begin,
        inside,
        begin,
        begin,
        begin,
        inside,
        inside,
    ]
    assert classes_of(tokenizer, [1, 1, 1], [0, 1, 0]) == [begin, inside, begin]


def test_the_space_of_a_sentencepiece_token_is_seen(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox runs to the den, the 7 foxes sleep"] * 30),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=30,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "tiny.model")
    ids = [tokenizer.model.piece_to_id(piece) for piece in ("▁the", "▁", "f", "o", "▁the", ",", "</s>")]
    assert tokenizer.decode([ids[0]]) == "the"
    assert classes_of(tokenizer, ids) == [
        "letters_begin",
        "whitespace",
        "letters_begin",
        "letters_inside",
        "letters_begin",
        "punctuation",
        "other",
    ]


def test_byte_tokens_of_a_hugging_face_folder_are_told_apart(world):
    tokenizer = load_tokenizer(world.hf)
    assert classes_of(tokenizer, tokenizer.encode("ab c. 3\n é<|im_end|>")) == [
        "letters_begin",
        "letters_inside",
        "whitespace",
        "letters_begin",
        "punctuation",
        "whitespace",
        "digits",
        "whitespace",
        "whitespace",
        "other",
        "other",
        "other",
    ]


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
