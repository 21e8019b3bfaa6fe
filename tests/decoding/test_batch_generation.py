"""Generation in batches against decoding without a cache and against generation for each source alone."""

from typing import Any

import numpy as np
import pytest
import torch
from support.batches import SPECIAL, VOCABULARY, model_of

from pmlm_dist.decoding.batch_generation import batches_by_length, build_search, generate_batch
from pmlm_dist.decoding.beam_search import Hypothesis
from pmlm_dist.decoding.settings import DecodingConfig, decoding_problems
from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.seq2seq_layout import Seq2SeqRule, build_seq2seq_layout

SOURCES = [
    np.concatenate([[SPECIAL.cls], np.random.default_rng(n).integers(5, VOCABULARY, size=n), [SPECIAL.sep]])
    for n in (9, 3, 14, 6)
]
CONFIG = DecodingConfig(beam=3, max_length=8, no_repeat_ngram=2, num_return_sequences=3)


def model():
    network = model_of(seed=1).eval()
    with torch.no_grad():
        network.head.bias[SPECIAL.sep] += 1.1  # some hypotheses end early
    return network


def without_cache(source: np.ndarray, config: DecodingConfig) -> list[Hypothesis]:
    """The same search, with every hypothesis laid out and recomputed completely in each step."""
    network, search = model(), build_search(config, SPECIAL)
    state: Any = search.start(1)
    for length in range(config.max_length):
        logits = []
        for tokens in state.tokens_BKL[0].tolist():
            rule = Seq2SeqRule(max_source=20, max_target=length + 1, noise=False)
            pair = (source[1:-1], np.array(tokens, dtype=np.int64))
            layout = build_seq2seq_layout([pair], sample_ids=[0], epochs=[0], seed=0, rule=rule, special=SPECIAL)
            tensors = {name: torch.from_numpy(array) for name, array in layout._asdict().items()}
            with torch.no_grad():
                logits_1MBV = network(inputs=SlotInputs.of(tensors), objectives=("par",))
            logits.append(logits_1MBV[0, length, 0, :VOCABULARY])
        state = search.advance(state, torch.stack(logits)[None])
        if bool(state.done_B.all()):
            break
    return search.hypotheses(state)[0]


def generate(config: DecodingConfig, *, batch: int = len(SOURCES)) -> list[list[Hypothesis]]:
    """Hypotheses for `SOURCES`, generated `batch` at a time."""
    network, search, results = model(), build_search(config, SPECIAL), {}
    for rows in batches_by_length([len(source) for source in SOURCES], batch=batch):
        sources = [SOURCES[row] for row in rows]
        found = generate_batch(network, sources, search=search, special=SPECIAL, sample_ids=rows)
        results |= dict(zip(rows, found, strict=True))
    return [results[row] for row in range(len(SOURCES))]


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_batch_generates_the_same_as_search_without_cache(method):
    config = DecodingConfig(
        **{**CONFIG.__dict__, "method": method, "num_return_sequences": 3 if method == "beam" else 1}
    )
    results = generate(config, batch=3)
    if method == "sample":  # the sample id seeds the draws
        again = generate(config, batch=1)
        assert [[h.tokens for h in row] for row in results] == [[h.tokens for h in row] for row in again]
        return
    for source, hypotheses in zip(SOURCES, results, strict=True):
        expected = without_cache(source, config)
        assert [h.tokens for h in hypotheses] == [h.tokens for h in expected]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in expected], abs=1e-9)
    lengths = {len(row[0].tokens) for row in results}
    assert len(lengths) > 1  # samples left the batch at different steps


def test_special_tokens_are_never_generated():
    config = DecodingConfig(method="sample", max_length=20, temperature=3.0, min_length=10)
    results = generate(config)
    generated = {token for row in results for h in row for token in h.tokens}
    assert len(generated) > 10
    assert not generated & set(SPECIAL.special)


def test_decoding_problems_lists_every_setting_out_of_range():
    config = DecodingConfig(beam=0, max_length=3, min_length=3, top_p=0.0, temperature=0.0, no_repeat_ngram=-1)
    text = " ".join(decoding_problems(config))
    for name in ("beam (0)", "min_length (3)", "top_p (0.0)", "temperature (0.0)", "no_repeat_ngram (-1)"):
        assert f"decoding.{name}" in text
    assert not decoding_problems(DecodingConfig())
