import random

import numpy as np

from pmlm_dist.corpus.documents import Document
from pmlm_dist.corpus.packing import draw
from pmlm_dist.corpus.selection import SCANNED, TextSample, cutoff, repeated, scanned

TEXTS = ["one text", "another text", "one text", "third text", "another text", "one text"]


def test_repeated_names_all_but_the_first():
    rows = [scanned(Document(number // 2, number % 2, text), draw=number) for number, text in enumerate(TEXTS)]
    random.Random(0).shuffle(rows)
    found = repeated(np.array(rows, SCANNED))
    assert {(int(row["unit"]), int(row["number"])) for row in found} == {(1, 0), (2, 0), (2, 1)}


def test_wordy_documents_have_two_words():
    wordy = {
        text: scanned(Document(0, 0, text), draw=0)[-1] for text in ("two words here", "word", "a -", "\0 \0", "é 1")
    }
    assert wordy == {"two words here": True, "word": False, "a -": False, "\0 \0": False, "é 1": True}


def test_sample_does_not_depend_on_how_documents_are_dealt():
    documents = [Document(0, number, "x" * (number % 50 + 1)) for number in range(3000)]

    def sampled(ranks: int) -> set[str]:
        samples = [TextSample(5000) for _ in range(ranks)]
        for document in documents:
            samples[document.number % ranks].add(document, order=draw(document.number))
        last = cutoff(np.sum([sample.bins() for sample in samples], axis=0), budget=5000)
        texts = [text for sample in samples for text in sample.texts(last)]
        assert 4800 < sum(map(len, texts)) <= 5000
        return set(map(str, sorted(texts)))

    assert sampled(1) == sampled(2) == sampled(7)


def test_sample_of_little_text_is_all_of_it():
    sample = TextSample(1000)
    for number in range(10):
        sample.add(Document(0, number, f"text {number}"), order=draw(number))
    assert len(sample.texts(cutoff(sample.bins(), budget=1000))) == 10


def test_sample_is_never_empty():
    sample = TextSample(10)
    for number in range(3):
        sample.add(Document(0, number, "y" * 100_000), order=draw(number))
    assert [len(text) for text in sample.texts(cutoff(sample.bins(), budget=10))] == [65_536]
