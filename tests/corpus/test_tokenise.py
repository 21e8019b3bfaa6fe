import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pmlm_dist.corpus import tokenise
from pmlm_dist.corpus.documents import Document
from pmlm_dist.vocab import Vocabulary


@given(st.text("ab \n", max_size=200), st.integers(2, 30))
def test_pieces_are_the_text(text: str, most: int):
    pieces = list(tokenise.cut_text(text, most=most))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    assert all(piece[0] in " \n" or len(before) == most for before, piece in itertools.pairwise(pieces))


def test_long_documents_and_batches_are_tokenised_as_wholes():
    texts = ["some words of a long text, again. " * 20_000, "short one", "\0", "third text " * 100]
    vocabulary = Vocabulary.train([text[:2000] for text in texts], 100)
    documents = [Document(0, number, text) for number, text in enumerate(texts)]
    found = list(tokenise.tokenised(documents, vocabulary))
    assert [document for document, _ in found] == documents
    for (_, ids), expected in zip(found, vocabulary.encode_batch(texts), strict=True):
        assert np.array_equal(ids, np.array(expected, np.uint32))
