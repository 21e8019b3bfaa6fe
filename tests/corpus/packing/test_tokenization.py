import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.segmentation import split_text
from pmlm_dist.corpus.packing import tokenization
from pmlm_dist.corpus.packing.tokenization import CachedEncoder
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SPECIAL_CHARACTERS = "\x00\x0b\x0c\x1c\x1f\x85\xa0\u2003\u3000\u0301\u200bİßςΣé日。’-'.,![MASK]\ufffd"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(
        ["some words of a text, again and again: the model's " + SPECIAL_CHARACTERS, "straße İstanbul"] * 5, 120
    )


@given(st.text("ab. \n", max_size=300), st.integers(2, 30), st.integers(0, 20))
def test_concatenated_pieces_are_the_text(text: str, most: int, least: int):
    pieces = list(split_text(text, min_length=min(least, most - 1), max_length=most))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for before, piece in itertools.pairwise(pieces):
        assert piece[0] in " \n" or len(before) == most


def test_pieces_end_with_sentences():
    text = 'One sentence. Another "sentence." v1.2 is none! 日本語。です。\n\nNew'
    pieces = [piece.strip() for piece in split_text(text, min_length=1, max_length=100)]
    assert pieces == ["One sentence.", 'Another "sentence."', "v1.2 is none!", "日本語。", "です。", "New"]


@given(
    st.lists(
        st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(SPECIAL_CHARACTERS + " \n\tab")))
    )
)
def test_cached_encoder_equals_the_tokenizer(vocabulary: Vocabulary, texts: list[str]):
    """Twice: with new and with cached words."""
    encoder, expected = CachedEncoder(vocabulary), vocabulary.encode_batch(texts)
    for _ in range(2):
        ids, lengths = encoder.encode(texts)
        assert lengths.tolist() == list(map(len, expected))
        assert ids.tolist() == [id for ids in expected for id in ids]


def test_cache_of_words_is_bounded(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenization, "_CACHED_WORDS", 50)
    encoder = CachedEncoder(vocabulary)
    for start in range(0, 1000, 20):
        texts = [
            " ".join(f"word{number}" for number in range(start, start + 20)) + " a" * 50 + f" {'x' * 99} {'y' * 40},"
        ]
        assert encoder.encode(texts)[0].tolist() == vocabulary.encode_batch(texts)[0]
        assert len(encoder._cache) <= 50
        assert all(len(word) <= 32 for word in encoder._cache)


def test_cached_encoder_bypasses_the_cache_for_other_tokenizers(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    assert vocabulary.tokenizes_words_independently
    monkeypatch.setitem(vocabulary.__dict__, "tokenizes_words_independently", False)
    calls = []
    monkeypatch.setattr(vocabulary, "encode_batch", lambda texts: calls.append(list(texts)) or [[7], [8, 9]])
    ids, lengths = CachedEncoder(vocabulary).encode(["a b", "c"])
    assert (calls, ids.tolist(), lengths.tolist()) == ([["a b", "c"]], [7, 8, 9], [1, 2])


def test_long_documents_are_tokenized_like_one_text():
    texts = ["some words of a long text, again. " * 20_000, "short one", "\0", "third text " * 100]
    vocabulary = Vocabulary.train([text[:2000] for text in texts], 100)
    documents = [Document(0, number, text) for number, text in enumerate(texts)]
    tokenized = list(tokenization.tokenize(documents, CachedEncoder(vocabulary)))
    assert [each.document for each in tokenized] == documents
    for each, expected in zip(tokenized, vocabulary.encode_batch(texts), strict=True):
        assert np.array_equal(each.ids, np.array(expected, np.uint32))


def test_no_added_word_is_cut(tmp_path: Path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", ".", "st", "louis"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"St. Louis": len(tokens)}))
    vocabulary = Vocabulary.load(tmp_path / "vocab.txt")
    text = "a st.\nLouis a. " * 400
    (document,) = tokenization.tokenize([Document(0, 0, text, "")], CachedEncoder(vocabulary))
    assert document.ids.tolist() == vocabulary.encode_batch([text])[0] == [5, len(tokens), 5, 6] * 400
    assert len(document.sentence_starts) > 10


def test_sentence_starts_are_the_first_tokens_of_sentences():
    text = "".join(f"Sentence {number} is about forty characters long. " for number in range(100))
    vocabulary = Vocabulary.train([text], 100)
    (tokenized,) = tokenization.tokenize([Document(0, 0, text)], CachedEncoder(vocabulary))
    first = vocabulary.encode_batch(["Sentence"])[0]
    assert len(tokenized.sentence_starts) >= 12
    assert all(tokenized.ids[at : at + len(first)].tolist() == first for at in tokenized.sentence_starts)
