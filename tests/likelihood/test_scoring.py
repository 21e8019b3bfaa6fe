"""Log-likelihoods of texts against step-by-step decoding and against a loop over masked tokens."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.batches import SPECIAL, VOCABULARY, model_of

from pmlm_dist.decoding.incremental import Appended, Context, DecodingSession
from pmlm_dist.likelihood.scoring import METHODS, Method, batches_of_texts, num_slots, score_texts
from pmlm_dist.model.transformer import PseudoMaskedLM, context_inputs
from pmlm_dist.vocabulary.vocabulary import Vocabulary

WORDS = [f"word{number}" if number % 3 else f"##piece{number}" for number in range(5, VOCABULARY)]
VOCAB = Vocabulary.from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
assert (VOCAB.pad_id, VOCAB.cls_id, VOCAB.sep_id, VOCAB.mask_id) == (
    SPECIAL.pad,
    SPECIAL.cls,
    SPECIAL.sep,
    SPECIAL.mask,
)


def random_texts(seed: int = 0, *, lengths: tuple[int, ...] = (9, 1, 14, 4, 9)) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(5, VOCABULARY, size=length).tolist() for length in lengths]


def step_by_step(model: PseudoMaskedLM, text: list[int]) -> list[float]:
    """Log-probability of each token in decoding, one token a step, after [CLS] alone."""
    one, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    context = Context(torch.full((1, 1), SPECIAL.cls), zero, zero, one)
    session = DecodingSession(model, context, mask_id=SPECIAL.mask, beams=1, capacity=len(text) + 1)
    scores = []
    for step, token in enumerate(text):
        previous = torch.tensor(text[step - 1 : step] if step else [], dtype=torch.int64).view(1, -1, 1)
        positions = torch.arange(max(step, 1), step + 2)[None]
        logits_V = session.step(Appended(previous, positions, torch.zeros_like(positions)))[0, 0, 0]
        scores.append(float(logits_V.log_softmax(-1)[token]))
    return scores


def one_by_one(model: PseudoMaskedLM, text: list[int], *, whole_words: bool) -> list[float]:
    """Log-probability of each token in a pass of its own, in which it and the rest of its word are masked."""
    scores = []
    for target, token in enumerate(text):
        ids = [SPECIAL.cls, *text, SPECIAL.sep]
        ids[target + 1] = SPECIAL.mask
        if whole_words:
            pieces = itertools.takewhile(lambda id: VOCAB.tokens[id].startswith("##"), text[target + 1 :])
            for number, _ in enumerate(pieces):
                ids[target + 2 + number] = SPECIAL.mask
        ids_1T = torch.tensor([ids])
        inputs = context_inputs(ids_1T, segments_BT=torch.zeros_like(ids_1T), valid_BT=torch.ones_like(ids_1T) > 0)
        logits_V = model.head(model.encode(inputs)[target + 1, 0], model.embeddings.token.weight)[:VOCABULARY]
        scores.append(float(logits_V.log_softmax(-1)[token].detach()))
    return scores


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("relative_bias", [True, False])
def test_par_equals_the_log_probabilities_of_decoding(attention: str, relative_bias: bool):
    model = model_of(attention=attention, relative_bias=relative_bias).eval()
    decoder = model_of(attention="fused", relative_bias=relative_bias).eval()
    texts = random_texts()
    scores = score_texts(model, texts, method="par", vocabulary=VOCAB, slots=64)
    for text, score in zip(texts, scores, strict=True):
        assert sum(score) == pytest.approx(sum(step_by_step(decoder, text)), abs=1e-6)
        np.testing.assert_allclose(score, step_by_step(decoder, text), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["pll", "pll-word"])
@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_pll_equals_a_loop_over_masked_tokens(method: Method, attention: str):
    model, texts = model_of(attention=attention).eval(), random_texts(1)
    scores = score_texts(model, texts, method=method, vocabulary=VOCAB, slots=64)
    for text, score in zip(texts, scores, strict=True):
        np.testing.assert_allclose(score, one_by_one(model, text, whole_words=method == "pll-word"), rtol=0, atol=1e-9)


def test_pieces_of_a_word_are_masked_for_the_pieces_before_them():
    model = model_of().eval()
    word, piece = (next(id for id in range(VOCAB.size) if VOCAB.tokens[id] == name) for name in ("word5", "##piece6"))
    alone, of_word = (
        score_texts(model, [[word, piece, word]], method=method, vocabulary=VOCAB, slots=64)[0]
        for method in ("pll", "pll-word")
    )
    assert alone[0] != of_word[0]
    assert alone[1:] == pytest.approx(of_word[1:], abs=1e-12)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.sampled_from(METHODS), st.integers(8, 200))
def test_batches_hold_every_text_once_within_the_slots(lengths, method, slots):
    groups = batches_of_texts(lengths, method, slots=slots)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(num_slots(lengths[number], method) for number in group) <= slots
    order = [lengths[number] for group in groups for number in group]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_the_batch(method: Method):
    model, texts = model_of(dtype=torch.float64).eval(), random_texts(2)
    together = score_texts(model, texts, method=method, vocabulary=VOCAB, slots=10_000)
    for text, score in zip(texts, together, strict=True):
        (alone,) = score_texts(model, [text], method=method, vocabulary=VOCAB, slots=1)
        np.testing.assert_allclose(score, alone, rtol=0, atol=1e-9)
