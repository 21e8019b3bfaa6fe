"""How much of a reference a text holds: ROUGE (Lin, 2004) and BLEU (Papineni et al., 2002), by their usual libraries.

ROUGE-1, -2 and -L are mean F1 with Porter's stemmer, as reports of summaries give them (rouge-score); BLEU is that of
the whole corpus without regard to case (sacrebleu). All from 0 to 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_ROUGE = ("rouge1", "rouge2", "rougeL")


def overlap_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The scores of `predictions`, one for each of `references`."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    assert len(predictions) == len(references) > 0
    scorer = RougeScorer(_ROUGE, use_stemmer=True)
    found = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    rouge = {name: 100 * statistics.fmean(of[name].fmeasure for of in found) for name in _ROUGE}
    return {**rouge, "bleu": sacrebleu.corpus_bleu(predictions, [list(references)], lowercase=True).score}
