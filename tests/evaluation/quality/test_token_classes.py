"""Classes of tokens, from their text."""

import pytest
import sentencepiece
import torch

from zeda_megatron.data.tokenizers import load_tokenizer
from zeda_megatron.evaluation.quality.token_classes import CLASSES, TokenClasses


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
