"""The vocabulary: WordPiece tokens, how text is read with them, special tokens and the padded size.

    vocab.txt | tokenizer.json  --files.py----.
                                                  |-->  Vocabulary  -->  token ids
                         texts  --training.py-'

The whole state is the text of a `tokenizer.json`, so processes can send a vocabulary as a string. Raw text never gives
a special token: a literal "[SEP]" in a document is tokenized as bracket, word, bracket. Other added tokens are words.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmlm_dist.config import raise_if_any
from pmlm_dist.files import write_atomically
from pmlm_dist.vocabulary.files import (
    BERT_WORDS,
    CUT_WORDS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    UNUSED,
    WORD_LIST,
    bert_specification,
    raise_unless_wordpiece,
    read_specification,
    tokenizer_settings,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTER_COVERAGE = 0.9995
VOCABULARY_FILES = (TOKENIZER, WORD_LIST, TOKENIZER_CONFIG)


class Vocabulary:
    """WordPiece tokens 0 .. size-1, and their tokenizer.

    Created by `load`, `train` or `from_tokens`. Vocabularies with an equal `fingerprint` read every text alike.
    """

    def __init__(self, tokenizer_json: str, *, origin: str = "vocabulary", notes: Sequence[str] = ()):
        specification = json.loads(tokenizer_json)
        raise_unless_wordpiece(specification, origin=origin)
        self._json = tokenizer_json
        self.notes = tuple(notes)
        """What a user should know of its files or its training, one sentence each."""
        self._words = [token for token in specification["added_tokens"] if token["content"] not in SPECIAL_TOKENS]
        self.words = tuple(word["content"] for word in self._words)
        """The added words, which text gives wherever they occur in it."""
        self.tokens = _ordered_tokens(specification, origin=origin)
        """All tokens in the order of their ids."""
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self.size = len(self.tokens)
        missing = " ".join(token for token in SPECIAL_TOKENS if token not in self.ids)
        way_out = "add them, or train a vocabulary with `pmlm prepare-corpus --vocabulary-size N`"
        raise_if_any([f"{origin} lacks the special tokens {missing}: {way_out}"] if missing else [])
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[token] for token in SPECIAL_TOKENS)

    @classmethod
    def load(cls, path: Path, *, cased: bool = False, keep_accents: bool = False) -> Vocabulary:
        """Read a folder with `tokenizer.json` or `vocab.txt`, or one of these files, with the settings beside it.

        `cased`, `keep_accents`: how a word list without settings is meant. Raises ConfigError for a missing file, a
        model other than WordPiece, a missing special token, and settings that contradict each other or the tokens.
        """
        flags = {**({"do_lower_case": False} if cased else {}), **({"strip_accents": False} if keep_accents else {})}
        specification, notes = read_specification(Path(path), flags)
        return cls(json.dumps(specification, ensure_ascii=False), origin=str(path), notes=notes)

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], *, origin: str = "vocabulary", **normalizer: bool) -> Vocabulary:
        """Create the BERT tokenizer over `tokens`, whose ids are their positions; uncased without `lowercase=False`."""
        repeated = [token for token, count in Counter(tokens).items() if count > 1]
        raise_if_any([f"{origin} holds tokens more than once, for example {token!r}" for token in repeated[:1]])
        return cls(json.dumps(bert_specification(tokens, **normalizer), ensure_ascii=False), origin=origin)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        size: int,
        *,
        cased: bool = False,
        keep_accents: bool = False,
        coverage: float = CHARACTER_COVERAGE,
    ) -> Vocabulary:
        """Train at most `size` tokens on `texts`; the same texts in any order give the same vocabulary.

        The special tokens have the ids 0 to 4. `texts` are kept in memory. The alphabet has the most frequent
        characters, which are `coverage` of the text; a word with any other character becomes [UNK]. Accents are kept
        also where stripping them would change more than 1 % of the characters: `notes`.
        """
        from pmlm_dist.vocabulary.training import TrainingText, train_tokens

        prepared = TrainingText.of(texts, cased=cased, keep_accents=keep_accents)
        tokens = train_tokens(prepared, size=size, coverage=coverage)
        specification = bert_specification(tokens, **prepared.settings)
        return cls(json.dumps(specification, ensure_ascii=False), origin="trained vocabulary", notes=prepared.notes)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`; and `vocab.txt` with `tokenizer_config.json`, if these two are read alike."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TOKENIZER, self._json)
        fits_lines = bool(self._base[-1]) and not any("\n" in token or token.endswith("\r") for token in self._base)
        if fits_lines and self._is_bert and self.tokens[: len(self._base)] == self._base:
            write_atomically(folder / WORD_LIST, "".join(f"{token}\n" for token in self._base))
            write_atomically(folder / TOKENIZER_CONFIG, json.dumps(self.settings, indent=2) + "\n")

    @property
    def _is_bert(self) -> bool:
        """Whether a `tokenizer_config.json` can express how text is read."""
        model = {name: value for name, value in bert_specification([])["model"].items() if name != "vocab"}
        is_bert = (self.processing["normalizer"] or {}).get("type") == "BertNormalizer"
        return is_bert and self.processing["pre_tokenizer"] == BERT_WORDS and self.processing["model"] == model

    @property
    def settings(self) -> dict[str, Any]:
        """Casing, accents and added words as in a `tokenizer_config.json`."""
        return tokenizer_settings(json.loads(self._json))

    @property
    def description(self) -> str:
        normalizer = json.loads(self._json).get("normalizer") or {}
        if normalizer.get("type") != "BertNormalizer":
            return "its own normalization"
        case, accents = normalizer["lowercase"], normalizer["strip_accents"]
        words = f", {len(self._words)} added words" if self._words else ""
        return f"{'uncased' if case else 'cased'}, accents {'stripped' if accents else 'kept'}{words}"

    def padded_size(self, multiple: int = 128) -> int:
        """Return `size` rounded up to a multiple: the rows of the embedding, which tensor parallelism divides."""
        return -(-self.size // multiple) * multiple

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Sorted ids of the five special tokens and of every `[unusedN]`: all tokens that are not text."""
        return tuple(i for i, token in enumerate(self.tokens) if token in SPECIAL_TOKENS or UNUSED.fullmatch(token))

    @cached_property
    def processing(self) -> dict[str, Any]:
        """Everything but the tokens and their ids that decides how a text is read: normalization, added words, ..."""
        specification = json.loads(self._json)
        model, flags = specification["model"], ("content", "single_word", "lstrip", "rstrip", "normalized")
        return {
            "normalizer": specification.get("normalizer"),
            "pre_tokenizer": specification.get("pre_tokenizer"),
            "model": {name: value for name, value in model.items() if name != "vocab"},
            "words": sorted([word[flag] for flag in flags] for word in self._words),
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over the ordered tokens and `processing`."""
        return hashlib.sha256(json.dumps([self.tokens, self.processing], sort_keys=True).encode()).hexdigest()

    def with_ids_swapped(self, a: int, b: int) -> Vocabulary:
        """Return the same tokens with the ids `a` and `b` swapped."""
        ids = {**self.ids, self.tokens[a]: b, self.tokens[b]: a}
        specification = json.loads(self._json)
        specification["model"]["vocab"] = {token: ids[token] for token in sorted(self._base, key=ids.__getitem__)}
        for token in specification["added_tokens"]:
            token["id"] = ids[token["content"]]
        return Vocabulary(json.dumps(specification, ensure_ascii=False))

    @property
    def exported_json(self) -> str:
        """`tokenizer.json` for other programs: it adds [CLS] and [SEP], and recognizes special tokens in texts."""
        bert, parts = bert_specification(self.tokens), ("truncation", "padding", "post_processor", "decoder")
        return json.dumps(json.loads(self._json) | {part: bert[part] for part in parts}, ensure_ascii=False)

    @cached_property
    def tokenizes_words_independently(self) -> bool:
        """Whether the ids of a text are those of its space-separated words, one after another: BERT's tokenizers."""
        is_bert = (self.processing["normalizer"] or {}).get("type") == "BertNormalizer"
        return is_bert and self.processing["pre_tokenizer"] in (BERT_WORDS, CUT_WORDS) and not self._words

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens around or in them."""
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._own_ids(encoding.ids) for encoding in encoded]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of `encode_batch`, and for each id its characters [start, stop) of the text."""
        encoded = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        return [(self._own_ids(encoding.ids), encoding.offsets) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with special tokens."""
        tokens, decoder = [self.tokens[int(id)] for id in ids], self._encoder.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)

    @cached_property
    def _base(self) -> tuple[str, ...]:
        """Tokens by id, without the added words that WordPiece does not know."""
        known = json.loads(self._json)["model"]["vocab"]
        words = {word for word in self.words if word not in known}
        return tuple(token for token in self.tokens if token not in words)

    @cached_property
    def _encoder(self) -> Tokenizer:
        from tokenizers import Tokenizer

        specification = json.loads(self._json)
        # Without special tokens, a literal "[MASK]" in a text is ordinary text. The library numbers the words that
        # WordPiece does not know after all other tokens.
        specification["model"]["vocab"] = {token: number for number, token in enumerate(self._base)}
        specification.update(added_tokens=self._words, truncation=None, padding=None, post_processor=None)
        return Tokenizer.from_str(json.dumps(specification))

    @cached_property
    def _renumbered(self) -> list[int] | None:
        """Id of each token of `_encoder`, if they differ."""
        known = set(self._base)
        ids = [self.ids[token] for token in (*self._base, *(word for word in self.words if word not in known))]
        return None if ids == list(range(self.size)) else ids

    def _own_ids(self, ids: list[int]) -> list[int]:
        own = self._renumbered
        return ids if own is None else [own[id] for id in ids]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}


def _ordered_tokens(specification: dict[str, Any], *, origin: str) -> tuple[str, ...]:
    ids: dict[str, int] = dict(specification["model"]["vocab"])
    for added in specification["added_tokens"]:
        ids.setdefault(added["content"], added["id"])
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise_if_any([f"{origin}: the token ids are not 0 .. {len(tokens) - 1}: give a vocabulary without gaps"])
    return tokens
