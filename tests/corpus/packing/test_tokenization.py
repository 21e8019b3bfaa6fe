import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus.input.documents import Document
from pmlm_dist.corpus.input.sentences import cut_text
from pmlm_dist.corpus.packing import tokenization
from pmlm_dist.corpus.packing.tokenization import Encoder
from pmlm_dist.vocab import Vocabulary

ODD = "\x00\x0b\x0c\x1c\x1f\x85\xa0\u2003\u3000\u0301\u200bİßςΣé日。’-'.,![MASK]\ufffd"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(["some words of a text, again and again: the model's " + ODD, "straße İstanbul"] * 5, 120)


@given(st.text("ab. \n", max_size=300), st.integers(2, 30), st.integers(0, 20))
def test_pieces_are_the_text(text: str, most: int, least: int):
    pieces = list(cut_text(text, least=min(least, most - 1), most=most))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for before, piece in itertools.pairwise(pieces):
        assert piece[0] in " \n" or len(before) == most


def test_pieces_end_with_sentences():
    text = 'One sentence. Another "sentence." v1.2 is none! 日本語。です。\n\nNew'
    pieces = [piece.strip() for piece in cut_text(text, least=1, most=100)]
    assert pieces == ["One sentence.", 'Another "sentence."', "v1.2 is none!", "日本語。", "です。", "New"]


@given(st.lists(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD + " \n\tab")))))
def test_remembered_words_are_the_tokenizer_s(vocabulary: Vocabulary, texts: list[str]):
    """Whatever the texts hold, twice over: new and remembered."""
    encoder, expected = Encoder(vocabulary), vocabulary.encode_batch(texts)
    for _ in range(2):
        ids, lengths = encoder.encode(texts)
        assert lengths.tolist() == list(map(len, expected))
        assert ids.tolist() == [id for ids in expected for id in ids]


def test_memory_of_words_is_bounded(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenization, "_REMEMBERED", 50)
    encoder = Encoder(vocabulary)
    for start in range(0, 1000, 20):
        texts = [
            " ".join(f"word{number}" for number in range(start, start + 20)) + " a" * 50 + f" {'x' * 99} {'y' * 40},"
        ]
        assert encoder.encode(texts)[0].tolist() == vocabulary.encode_batch(texts)[0]
        assert len(encoder._known) <= 50
        assert all(len(word) <= 32 for word in encoder._known)


def test_a_tokenizer_that_reads_across_spaces_is_asked_itself(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch):
    assert vocabulary.reads_words_alone
    monkeypatch.setitem(vocabulary.__dict__, "reads_words_alone", False)
    asked = []
    monkeypatch.setattr(vocabulary, "encode_batch", lambda texts: asked.append(list(texts)) or [[7], [8, 9]])
    ids, lengths = Encoder(vocabulary).encode(["a b", "c"])
    assert (asked, ids.tolist(), lengths.tolist()) == ([["a b", "c"]], [7, 8, 9], [1, 2])


def test_long_documents_and_batches_are_tokenised_as_wholes():
    texts = ["some words of a long text, again. " * 20_000, "short one", "\0", "third text " * 100]
    vocabulary = Vocabulary.train([text[:2000] for text in texts], 100)
    documents = [Document(0, number, text) for number, text in enumerate(texts)]
    found = list(tokenization.tokenized(documents, Encoder(vocabulary)))
    assert [each.document for each in found] == documents
    for each, expected in zip(found, vocabulary.encode_batch(texts), strict=True):
        assert np.array_equal(each.ids, np.array(expected, np.uint32))


def test_sentences_begin_where_they_are_said_to():
    text = "".join(f"Sentence {number} is about forty characters long. " for number in range(100))
    vocabulary = Vocabulary.train([text], 100)
    (found,) = tokenization.tokenized([Document(0, 0, text)], Encoder(vocabulary))
    first = vocabulary.encode_batch(["Sentence"])[0]
    assert len(found.sentences) >= 12
    assert all(found.ids[at : at + len(first)].tolist() == first for at in found.sentences)
