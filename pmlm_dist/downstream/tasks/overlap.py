"""Overlap metrics of generated text: ROUGE (Lin, 2004) by rouge-score, BLEU (Papineni et al., 2002) by sacrebleu.

ROUGE-1, ROUGE-2 and ROUGE-L: mean F1 with Porter's stemmer for ASCII words, as in summarization papers. BLEU: corpus
level, lower case, with the tokenizer of sacrebleu for the script of the references. All values lie between 0 and 100,
and equal texts score 100 in any script.

*Words.* rouge-score knows the words of ASCII alone. Here a word is a run of letters, marks and digits. A character of a
script that is written without spaces (Chinese, Japanese, Thai, ...) is a word of its own. The words of ASCII texts are
those of rouge-score.
"""

import functools
import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any

_ROUGE = ("rouge1", "rouge2", "rougeL")
_HAN = ("CJK", "IDEOGRAPHIC", "BOPOMOFO")
_UNSPACED = (
    *_HAN,
    *("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "YI SYLLABLE", "HENTAIGANA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "NEW TAI", "TAI"),
)
"""How the names of characters begin, in scripts that are written without spaces between words."""


def overlap_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score `predictions` against one reference each."""
    from rouge_score.rouge_scorer import RougeScorer

    assert len(predictions) == len(references) > 0
    scorer = RougeScorer(_ROUGE, tokenizer=_SplitText())
    pairs = [_rouge(scorer, text, reference) for text, reference in zip(predictions, references, strict=True)]
    rouge = {name: 100 * statistics.fmean(pair[name] for pair in pairs) for name in _ROUGE}
    bleu = _bleu(references).corpus_score(list(predictions), [list(references)]).score
    return {**rouge, "bleu": min(bleu, 100.0)}  # equal texts: 100.00000000000004


def bleu_signature(references: Sequence[str]) -> str:
    """Return sacrebleu's signature of the BLEU that `overlap_scores` computes: tokenizer, version and settings."""
    bleu = _bleu(references)
    bleu.corpus_score(list(references), [list(references)])  # the signature counts the references
    return bleu.get_signature().format()


def _bleu(references: Sequence[str]) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # Effective order: a corpus without any 4-gram would score 0 even for equal texts. Nothing else depends on it.
    return BLEU(lowercase=True, tokenize=bleu_tokenizer(references), effective_order=True)


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Return the name of sacrebleu's tokenizer for the script of most words of `references`.

    `zh` splits Chinese characters; `char` splits all, for the other scripts without spaces; `intl` splits Unicode's
    punctuation; `13a`, for Latin letters, is what papers report.
    """
    words = [word for reference in references for word in text_words(reference)]
    unspaced = [word for word in words if is_unspaced(word[0])]
    if 2 * len(unspaced) > len(words):
        han = sum(unicodedata.name(word, "").startswith(_HAN) for word in unspaced)
        return "zh" if han > 0.9 * len(unspaced) else "char"  # Japanese mixes Chinese characters and kana
    spaced = [word for word in words if not is_unspaced(word[0]) and not word.isdecimal()]
    latin = sum(unicodedata.name(word[0], "").startswith("LATIN") for word in spaced)
    return "13a" if 2 * latin >= len(spaced) else "intl"


def _rouge(scorer: Any, prediction: str, reference: str) -> dict[str, float]:
    words = [text_words(prediction), text_words(reference)]
    if not words[1]:  # punctuation or emoji alone: every character counts
        words = [[c for c in text if not c.isspace()] for text in (prediction, reference)]
    if words[0] == words[1]:  # a single word has no bigram, whose F1 would be 0
        return dict.fromkeys(_ROUGE, 1.0)
    scores = scorer.score("\n".join(words[1]), "\n".join(words[0]))
    return {name: scores[name].fmeasure for name in _ROUGE}


class _SplitText:
    """Tokenizer for `RougeScorer`: the lines of a text, since words have been split already."""

    def tokenize(self, text: str) -> list[str]:
        return text.split("\n") if text else []


def text_words(text: str) -> list[str]:
    """Return the words of `text` in lower case; ASCII words are stemmed.

    >>> text_words("Cats don't")
    ['cat', 'don', 't']
    """
    normal = unicodedata.normalize("NFKC", text).lower()
    return [_stem(word) if word.isascii() else word for word in "".join(map(_spaced, normal)).split()]


@functools.cache
def _spaced(character: str) -> str:
    """Return a character of a word, with spaces around it if it is a word; a space for all others."""
    category = unicodedata.category(character)
    if category == "Cf":  # joiners and marks of direction are invisible, and vocabularies drop them
        return ""
    if category[0] not in "LMN":
        return " "
    return f" {character} " if is_unspaced(character) else character


@functools.cache
def is_unspaced(character: str) -> bool:
    """Return True for a character of a script that is written without spaces between words."""
    return unicodedata.name(character, "").startswith(_UNSPACED)


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    (stemmed,) = _rouge_tokenizer().tokenize(word)
    return stemmed


@functools.cache
def _rouge_tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
