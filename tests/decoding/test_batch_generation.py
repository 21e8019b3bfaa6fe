"""Answers from the model, against decoding without any cache and against answering each source alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.batches import SPECIAL, VOCABULARY, model_of

from pmlm_dist.decoding.batch_generation import build_search, generate_batches
from pmlm_dist.decoding.beam_search import Hypothesis
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout

SOURCES = [
    np.concatenate([[SPECIAL.cls], np.random.default_rng(n).integers(5, VOCABULARY, size=n), [SPECIAL.sep]])
    for n in (9, 3, 14, 6)
]
CONFIG = DecodingConfig(beam=3, max_length=8, no_repeat_ngram=2, num_return_sequences=3)


def model():
    found = model_of(seed=1).eval()
    with torch.no_grad():
        found.head.bias[SPECIAL.sep] += 1.1  # some hypotheses end early
    return found


def without_cache(source: np.ndarray, config: DecodingConfig) -> list[Hypothesis]:
    """The same search, with the whole of every hypothesis laid out and computed anew at each step."""
    network, search = model(), build_search(config, SPECIAL)
    state: Any = search.start(1)
    for length in range(config.max_length):
        logits = []
        for tokens in state.tokens_BKL[0].tolist():
            rule = Seq2SeqRule(max_source=20, max_target=length + 1, noise=False)
            pair = (source[1:-1], np.array(tokens, dtype=np.int64))
            made = build_seq2seq_layout([pair], sample_ids=[0], epochs=[0], seed=0, rule=rule, special=SPECIAL)
            named = {name: torch.from_numpy(array) for name, array in made._asdict().items()}
            inputs = [named[f"{name}_BT"] for name in ("tokens", "positions", "segments", "order", "valid")]
            names = ("positions_BT", "segments_BT", "order_BT", "valid_BT")
            with torch.no_grad():
                out = network(
                    inputs[0],
                    **dict(zip(names, inputs[1:], strict=True)),
                    predicted_BM=named["predicted_BM"],
                    objectives=("par",),
                )
            logits.append(out[0, length, 0, :VOCABULARY])
        state = search.advance(state, torch.stack(logits)[None])
        if bool(state.done_B.all()):
            break
    return search.hypotheses(state)[0]


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_answers_of_a_batch_are_those_of_a_search_without_cache(method):
    config = DecodingConfig(
        **{**CONFIG.__dict__, "method": method, "num_return_sequences": 3 if method == "beam" else 1}
    )
    answers = generate_batches(model(), SOURCES, search=build_search(config, SPECIAL), special=SPECIAL, batch=3)
    if method == "sample":  # the number of the sample decides what is drawn
        again = generate_batches(model(), SOURCES, search=build_search(config, SPECIAL), special=SPECIAL, batch=1)
        assert [[h.tokens for h in of] for of in answers] == [[h.tokens for h in of] for of in again]
        return
    for source, found in zip(SOURCES, answers, strict=True):
        expected = without_cache(source, config)
        assert [h.tokens for h in found] == [h.tokens for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-9)
    lengths = {len(of[0].tokens) for of in answers}
    assert len(lengths) > 1  # so that samples left the batch at different times


def test_special_tokens_are_never_written():
    config = DecodingConfig(method="sample", max_length=20, temperature=3.0, min_length=10)
    answers = generate_batches(model(), SOURCES, search=build_search(config, SPECIAL), special=SPECIAL)
    written = {token for of in answers for h in of for token in h.tokens}
    assert len(written) > 10
    assert not written & set(SPECIAL.special)


def test_all_wrong_settings_are_listed():
    config = DecodingConfig(beam=0, max_length=3, min_length=3, top_p=0.0, temperature=0.0, no_repeat_ngram=-1)
    text = " ".join(decoding_problems(config))
    for name in ("beam (0)", "min_length (3)", "top_p (0.0)", "temperature (0.0)", "no_repeat_ngram (-1)"):
        assert f"decoding.{name}" in text
    assert not decoding_problems(DecodingConfig())
