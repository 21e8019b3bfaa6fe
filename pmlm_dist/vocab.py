"""The vocabulary: uncased WordPiece, its special tokens and its padded size.

    vocab.txt | tokenizer.json | texts  ->  Vocabulary  ->  token ids

Only this module uses the `tokenizers` library. The whole state is the text of a `tokenizer.json`, so processes can send
a vocabulary as a string. Raw text never gives a special token: a literal "[SEP]" in a document is tokenized as bracket,
word, bracket.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")
_UNUSED = re.compile(r"\[unused\d+\]")
_ALPHABET_LIMIT = 1000


class Vocabulary:
    """WordPiece tokens 0 .. size-1, and their tokenizer.

    Created by `load`, `train` or `from_tokens`. Equal tokens give an equal `fingerprint`, from any kind of file.
    """

    def __init__(self, tokenizer_json: str, *, origin: str = "vocabulary"):
        specification = json.loads(tokenizer_json)
        self._json = tokenizer_json
        self._tokens = _ordered_tokens(specification, origin=origin)
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        missing = [token for token in SPECIAL_TOKENS if token not in self._ids]
        if missing:
            raise ConfigError(
                [
                    f"{origin} lacks the special tokens {' '.join(missing)}: "
                    f"add them, or train a vocabulary with `pmlm prepare-corpus --vocabulary-size N`"
                ]
            )

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a folder with `tokenizer.json`, a `tokenizer.json`, or a BERT `vocab.txt` (one token per line).

        Raises ConfigError for a missing file, a model other than WordPiece, or a missing special token.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise_if_any([f"vocabulary ({path}): no such file; give a tokenizer.json, its folder, or a BERT vocab.txt"])
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix != ".json":
                return cls.from_tokens(text.splitlines(), origin=str(file))
            return cls(text, origin=str(file))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError([f"vocabulary ({file}) cannot be read: {error}; give another file"]) from error

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], *, origin: str = "vocabulary") -> Vocabulary:
        """Create the uncased BERT tokenizer over `tokens`, whose ids are their positions."""
        repeated = [token for token, count in Counter(tokens).items() if count > 1]
        if repeated:
            raise_if_any(
                [f"{origin} holds tokens more than once, for example {repeated[0]!r}: every line must be distinct"]
            )
        return cls(_tokenizer_json(tokens), origin=origin)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """Train at most `size` tokens on `texts`; the same texts in any order give the same vocabulary.

        The special tokens have the ids 0 to 4. `texts` are kept in memory. The alphabet has at most `size` / 16
        characters (at least 64, at most 1000); a word with any other character becomes [UNK].
        """
        texts = list(texts)
        alphabet = _alphabet(texts, limit=min(_ALPHABET_LIMIT, max(64, size // 16)))
        # The library numbers the "##c" tokens in the order of a randomly seeded hash table, and breaks ties between
        # equally frequent pairs by these numbers. Sorted "##c" tokens as input make the result reproducible.
        pieces = _train(texts, size=0, alphabet=alphabet, first=SPECIAL_TOKENS)
        continuations = sorted(token for token in pieces if token.startswith(CONTINUATION) and len(token) == 3)
        tokens = _train(texts, size=size, alphabet=alphabet, first=(*SPECIAL_TOKENS, *continuations))
        if len(tokens) > size:
            raise_if_any(
                [f"vocabulary_size ({size}) is below the {len(tokens)} characters and special tokens: use more"]
            )
        return cls.from_tokens(tokens, origin="trained vocabulary")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `vocab.txt` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        words = "".join(f"{token}\n" for token in self._tokens)
        for name, text in zip(VOCABULARY_FILES, (self._json, words), strict=True):
            write_atomically(folder / name, text, durable=False)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def padded_size(self, multiple: int = 128) -> int:
        """Return `size` rounded up to a multiple: the rows of the embedding, which tensor parallelism divides."""
        return -(-self.size // multiple) * multiple

    @property
    def pad_id(self) -> int:
        """Id of [PAD]."""
        return self._ids[PAD]

    @property
    def unk_id(self) -> int:
        """Id of [UNK]."""
        return self._ids[UNK]

    @property
    def cls_id(self) -> int:
        """Id of [CLS]."""
        return self._ids[CLS]

    @property
    def sep_id(self) -> int:
        """Id of [SEP]."""
        return self._ids[SEP]

    @property
    def mask_id(self) -> int:
        """Id of [MASK]."""
        return self._ids[MASK]

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Sorted ids of the five special tokens and of every `[unusedN]`: all tokens that are not text."""
        special = {self._ids[token] for token in SPECIAL_TOKENS}
        return tuple(sorted(special | {i for token, i in self._ids.items() if _UNUSED.fullmatch(token)}))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over the ordered tokens."""
        return hashlib.sha256("\n".join(self._tokens).encode()).hexdigest()

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        return tuple(self._tokens)

    def with_ids_swapped(self, a: int, b: int) -> Vocabulary:
        """Return the same tokens with the ids `a` and `b` swapped."""
        ids = dict(self._ids)
        ids[self._tokens[a]], ids[self._tokens[b]] = b, a
        return self._with_ids(ids)

    def renamed(self, names: Mapping[str, str]) -> Vocabulary:
        """Return the same ids with other names for the tokens in `names`; the text processing is unchanged."""
        return self._with_ids({names.get(token, token): id for token, id in self._ids.items()}, names)

    def _with_ids(self, ids: dict[str, int], names: Mapping[str, str] | None = None) -> Vocabulary:
        specification = json.loads(self._json)
        unknown = specification["model"]["unk_token"]
        specification["model"]["unk_token"] = (names or {}).get(unknown, unknown)
        specification["model"]["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
        specification["added_tokens"] = []
        return Vocabulary(json.dumps(specification, ensure_ascii=False))

    @property
    def exported_json(self) -> str:
        """`tokenizer.json` for other programs: it adds [CLS] and [SEP], and recognizes special tokens in texts."""
        specification = json.loads(self._json)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = sorted(SPECIAL_TOKENS, key=self._ids.__getitem__)
        specification.update(
            added_tokens=[{"id": self._ids[token], "content": token, **flags} for token in special],
            truncation=None,
            padding=None,
            post_processor={"type": "BertProcessing", "sep": [SEP, self.sep_id], "cls": [CLS, self.cls_id]},
            decoder={"type": "WordPiece", "prefix": CONTINUATION, "cleanup": True},
        )
        specification["model"]["vocab"] = dict(sorted(self._ids.items(), key=lambda item: item[1]))
        return json.dumps(specification, ensure_ascii=False)

    def token(self, id: int) -> str:
        """Return the token with this id."""
        return self._tokens[id]

    @cached_property
    def tokenizes_words_independently(self) -> bool:
        """Whether the ids of a text are those of its space-separated words, one after another: BERT's tokenizers."""
        specification = json.loads(self._json)
        steps = [(specification.get(step) or {}).get("type") for step in ("normalizer", "pre_tokenizer")]
        return steps == ["BertNormalizer", "BertPreTokenizer"]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens around or in them."""
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of `encode_batch`, and for each id its characters [start, stop) of the text."""
        encoded = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with special tokens."""
        return self._encoder.decode([int(id) for id in ids], skip_special_tokens=False)

    @cached_property
    def _encoder(self) -> Tokenizer:
        from tokenizers import Tokenizer

        specification = json.loads(self._json)
        # Without added tokens, a literal "[MASK]" in a text is ordinary text.
        specification.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
        return Tokenizer.from_str(json.dumps(specification))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}


def _ordered_tokens(specification: dict[str, Any], *, origin: str) -> list[str]:
    model = specification.get("model", {}) if isinstance(specification, dict) else {}
    if model.get("type") != "WordPiece":
        raise_if_any(
            [f"{origin} holds a {model.get('type') or 'nameless'} model, not WordPiece: give a WordPiece tokenizer"]
        )
    ids: dict[str, int] = dict(model["vocab"])
    for added in specification.get("added_tokens") or []:
        ids.setdefault(added["content"], added["id"])
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise_if_any([f"{origin}: the token ids are not 0 .. {len(tokens) - 1}: give a vocabulary without gaps"])
    return tokens


def _tokenizer_json(tokens: Sequence[str]) -> str:
    """Return the `tokenizer.json` of the uncased BERT tokenizer over `tokens`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=UNK, max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    present = [token for token in SPECIAL_TOKENS if token in ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in present])
    if CLS in ids and SEP in ids:
        tokenizer.post_processor = processors.BertProcessing((SEP, ids[SEP]), (CLS, ids[CLS]))
    return tokenizer.to_str(pretty=False)


def _normalizer() -> Any:
    from tokenizers import normalizers

    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)


def _pre_tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.BertPreTokenizer()


def _alphabet(texts: Sequence[str], *, limit: int) -> list[str]:
    """Return the `limit` most frequent characters of the normalized texts; for equal counts the lower code point."""
    normalizer, counts = _normalizer(), Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    visible = [character for character in counts if not character.isspace()]
    return sorted(visible, key=lambda character: (-counts[character], character))[:limit]


def _train(texts: Sequence[str], *, size: int, alphabet: list[str], first: Sequence[str]) -> list[str]:
    """Train with the library; the tokens of `first` have the lowest ids."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
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
