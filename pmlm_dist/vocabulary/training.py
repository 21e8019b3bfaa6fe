"""Training of a WordPiece vocabulary: texts -> readable words -> alphabet -> tokens.

Words that are [UNK] whatever is trained, longer than 100 characters or with a character outside of the alphabet, are no
part of the training text. Time is linear in the text, for words of any length.
"""

import itertools
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pmlm_dist.config import ConfigError
from pmlm_dist.vocabulary.files import (
    CONTINUATION,
    MAX_WORD_CHARACTERS,
    SPECIAL_TOKENS,
    UNK,
    bert_specification,
    without_accents,
)

_MAX_STRIPPED = 0.01
"""Share of the characters that stripping accents may change: more in Hindi, Thai, Korean, German, not in English."""
_LONG_UNSPACED = re.compile(rf"[\u0e00-\u109f\u1780-\u17ff]{{{MAX_WORD_CHARACTERS + 1},}}")
_LONG_RUN = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")


@dataclass(frozen=True)
class TrainingText:
    """Normalized texts without words of more than 100 characters, and how they were read."""

    texts: list[str]
    settings: dict[str, bool]
    """Of `bert_specification`."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str], *, cased: bool, keep_accents: bool) -> Self:
        """Normalize `texts`, without accents if neither a setting nor the texts require them."""
        texts, notes = list(texts), []
        if not cased and not keep_accents and (share := _stripped_share(texts)) > _MAX_STRIPPED:
            keep_accents = True
            notes.append(f"accents are kept: stripping them would change {share:.1%} of the characters")
        settings = {"lowercase": not cased, "strip_accents": not (cased or keep_accents)}
        if any(_LONG_UNSPACED.search(text) for text in texts):
            settings["cut_words"] = True
            notes.append(f"text without spaces (Thai, Khmer, ...) is cut into {MAX_WORD_CHARACTERS} characters at most")
        tokenizer = _bert_tokenizer(**settings)
        return cls([_readable(text, tokenizer) for text in texts], settings, tuple(notes))


def train_tokens(text: TrainingText, *, size: int, coverage: float) -> list[str]:
    """Return at most `size` tokens for `text`. Raises ConfigError if the alphabet needs more."""
    alphabet = _alphabet(text.texts, coverage=coverage)
    texts, words = _without_other_characters(text.texts, alphabet), _bert_tokenizer(**text.settings).pre_tokenizer
    # The library numbers the "##c" tokens in the order of a randomly seeded hash table, and breaks ties between
    # equally frequent pairs by these numbers. Sorted "##c" tokens as input make the result reproducible.
    pieces = _train(texts, words, size=0, alphabet=alphabet, first=SPECIAL_TOKENS)
    continuations = sorted(token for token in pieces if token.startswith(CONTINUATION) and len(token) == 3)
    tokens = _train(texts, words, size=size, alphabet=alphabet, first=(*SPECIAL_TOKENS, *continuations))
    if len(tokens) > size:
        raise ConfigError(
            [f"vocabulary_size ({size}) is below the {len(tokens)} tokens of the special tokens and of the "
             f"{len(alphabet)} characters that are {coverage:.4%} of the text: use more, or a lower "
             "--character-coverage"]
        )  # fmt: skip
    return tokens


def _stripped_share(texts: Sequence[str]) -> float:
    """Return the share of the characters that stripping accents changes."""
    counts = Counter[str]()
    for text in texts:
        if not text.isascii():
            counts.update(text.lower())
    changed = sum(count for character, count in counts.items() if without_accents(character) != character)
    return changed / max(1, sum(map(len, texts)))


def _bert_tokenizer(**settings: bool) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(bert_specification([UNK], **settings)))


def _readable(text: str, tokenizer: Any) -> str:
    """Normalize `text` and remove words of more than 100 characters."""

    def short_words(run: re.Match[str]) -> str:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(run[0])
        return " ".join(word for word, _ in words if len(word) <= MAX_WORD_CHARACTERS)

    return _LONG_RUN.sub(short_words, tokenizer.normalizer.normalize_str(text))


def _alphabet(texts: Sequence[str], *, coverage: float) -> list[str]:
    """Return the most frequent characters that are `coverage` of the texts; for equal counts the lower code point."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    visible = sorted((character for character in counts if not character.isspace()), key=lambda c: (-counts[c], c))
    covered = list(itertools.accumulate(counts[character] for character in visible))
    return visible[: bisect_left(covered, coverage * covered[-1]) + 1] if covered else []


def _without_other_characters(texts: Sequence[str], alphabet: Sequence[str]) -> list[str]:
    other = re.compile(rf"[^\s{''.join(map(re.escape, alphabet))}]")
    return [
        " ".join(run for run in text.split() if not other.search(run)) if other.search(text) else text for text in texts
    ]


def _train(texts: Sequence[str], words: Any, *, size: int, alphabet: list[str], first: Sequence[str]) -> list[str]:
    """Train with the library; the tokens of `first` have the lowest ids."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.pre_tokenizer = words
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(first),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)
