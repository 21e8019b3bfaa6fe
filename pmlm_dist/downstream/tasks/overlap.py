"""Overlap metrics of generated text: ROUGE (Lin, 2004) by rouge-score, BLEU (Papineni et al., 2002) by sacrebleu.

ROUGE-1, ROUGE-2 and ROUGE-L: mean F1 with Porter's stemmer, as in summarization papers. BLEU: corpus level, lower case.
All values lie between 0 and 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_ROUGE = ("rouge1", "rouge2", "rougeL")


def overlap_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score `predictions` against one reference each."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    assert len(predictions) == len(references) > 0
    scorer = RougeScorer(_ROUGE, use_stemmer=True)
    pairs = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
    rouge = {name: 100 * statistics.fmean(pair[name].fmeasure for pair in pairs) for name in _ROUGE}
    return {**rouge, "bleu": sacrebleu.corpus_bleu(predictions, [list(references)], lowercase=True).score}
