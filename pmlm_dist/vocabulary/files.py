r"""Files of a WordPiece tokenizer, and the one specification that they define together. Standard library only.

    tokenizer.json | vocab.txt (a token ends at \n or \r\n alone; its id is the number of its line)
    tokenizer_config.json, special_tokens_map.json      casing, accents, names of the special tokens, added words
    added_tokens.json                                   added words: content -> id
        --read_specification-->  tokenizer.json with the special tokens [PAD] [UNK] [CLS] [SEP] [MASK], and notes

Settings beside a vocabulary apply as in `transformers`. Contradictions and what cannot be followed raise ConfigError.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmlm_dist.config import ConfigError, raise_if_any
from pmlm_dist.json_input import read_json_object

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
MAX_WORD_CHARACTERS = 100
"""A longer word is [UNK] in every vocabulary."""
TOKENIZER, WORD_LIST = "tokenizer.json", "vocab.txt"
TOKENIZER_CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
UNUSED = re.compile(r"\[unused\d+\]")

_ROLES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
_CONTROL = (*SPECIAL_TOKENS, "<s>", "</s>", "<pad>", "<unk>", "<mask>")
"""Never text, even if the tokenizer has no use for them: MPNet's vocabulary has BERT's special tokens too."""
_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "clean_text": "clean_text",
}
"""Name in tokenizer_config.json -> name in a BertNormalizer."""
_UNSUPPORTED = {
    "do_basic_tokenize": (True,),
    "never_split": (None, []),
    "word_tokenizer_type": (None, "basic"),
    "subword_tokenizer_type": (None, "wordpiece"),
    "wordpieces_prefix": (CONTINUATION,),
}
"""Settings of word lists -> the values that this tokenizer implements, the default first."""
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


BERT_WORDS = {"type": "BertPreTokenizer"}
_CUT = {
    "type": "Split",
    "pattern": {"Regex": rf"[\u0e00-\u109f\u1780-\u17ff]{{1,{MAX_WORD_CHARACTERS}}}"},
    "behavior": "Isolated",
    "invert": False,
}
CUT_WORDS = {"type": "Sequence", "pretokenizers": [BERT_WORDS, _CUT]}
"""BERT's words; those of Thai, Lao, Tibetan, Burmese and Khmer, written without spaces, have at most 100 characters."""


def bert_specification(
    tokens: Sequence[str], *, lowercase: bool = True, strip_accents: bool | None = None, cut_words: bool = False
) -> Any:
    """Return the `tokenizer.json` of the BERT tokenizer over `tokens`.

    `strip_accents`: None for those of lower-case text. `cut_words`: with `CUT_WORDS`.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    ends = {"sep": [SEP, ids.get(SEP)], "cls": [CLS, ids.get(CLS)]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special({token: token for token in SPECIAL_TOKENS}, ids),
        "normalizer": bert_normalizer(lowercase=lowercase, strip_accents=strip_accents),
        "pre_tokenizer": CUT_WORDS if cut_words else BERT_WORDS,
        "post_processor": {"type": "BertProcessing", **ends} if {CLS, SEP} <= ids.keys() else None,
        "decoder": {"type": "WordPiece", "prefix": CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNK,
            "continuing_subword_prefix": CONTINUATION,
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": ids,
        },
    }


def bert_normalizer(**settings: bool | None) -> dict[str, Any]:
    """Return a BertNormalizer with every setting; accents are stripped from lower-case text if not set."""
    given = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True, **settings}
    if given["strip_accents"] is None:
        given["strip_accents"] = given["lowercase"]
    return {"type": "BertNormalizer", **given}


def tokenizer_settings(specification: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a tokenizer_config.json that makes a vocab.txt read as `specification` does."""
    normalizer = specification.get("normalizer") or {}
    is_bert = normalizer.get("type") == "BertNormalizer"
    words = [token for token in specification["added_tokens"] if token["content"] not in SPECIAL_TOKENS]
    decoder = {str(word["id"]): {name: word[name] for name in ("content", *_FLAGS)} for word in words}
    settings = {theirs: normalizer[ours] for theirs, ours in _SETTINGS.items()} if is_bert else {}
    return {**settings, **({"added_tokens_decoder": decoder} if decoder else {})}


def read_specification(path: Path, flags: Mapping[str, bool]) -> tuple[dict[str, Any], list[str]]:
    """Read a folder, a tokenizer.json or a word list, with the files beside it; return its `tokenizer.json` and notes.

    `flags`: settings of tokenizer_config.json given by the user. They must not contradict the files.
    """
    file = _file_of(path)
    origin = f"vocabulary ({file})"
    try:
        config = {**_beside(file, SPECIAL), **_beside(file, TOKENIZER_CONFIG)}
        notes: list[str] = []
        if file.suffix == ".json":
            specification = read_json_object(file)
            raise_unless_wordpiece(specification, origin=origin)
            _check_normalizer(specification.get("normalizer"), config, flags, origin=origin)
        else:
            tokens, notes = _read_words(file)
            specification = bert_specification(tokens)
            specification["normalizer"] = _normalizer_of_words(tokens, config, flags, origin=origin)
        added = _added_tokens(specification, config, _beside(file, ADDED), origin=origin)
        "".join([*specification["model"]["vocab"], *added]).encode()  # a JSON escape can be half of a surrogate pair
        notes += _notes_on_tokens(specification, added, origin=origin)
        return _with_special_tokens(specification, config, added), notes
    except (UnicodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error) if isinstance(error, UnicodeError) else repr(error)  # whose repr has the whole file
        raise ConfigError([f"{origin} cannot be read: {reason}; give another file"]) from error


def raise_unless_wordpiece(specification: Any, *, origin: str) -> None:
    """Raise ConfigError for a tokenizer.json with another model than WordPiece."""
    model = specification.get("model", {}) if isinstance(specification, dict) else {}
    if model.get("type") != "WordPiece":
        raise ConfigError(
            [f"{origin} holds a {model.get('type') or 'nameless'} model, not WordPiece: give a WordPiece tokenizer"]
        )


# --------------------------------------------------------------------------------------------------------------- files


def _file_of(path: Path) -> Path:
    candidates = [path / TOKENIZER, path / WORD_LIST] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise ConfigError(
        [f"vocabulary ({path}): no such file; give a tokenizer.json, a BERT vocab.txt, or the folder of one"]
    )


def _beside(file: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in the file `name` beside `file`, `NAME-name` beside `NAME-vocab.txt`; {} without one."""
    stem = file.name.removesuffix(TOKENIZER).removesuffix(WORD_LIST)
    prefix = stem if stem != file.name else ""
    files = [other for other in (file.with_name(f"{prefix}{name}"), file.with_name(name)) if other.is_file()]
    return read_json_object(files[0]) if files else {}


def _read_words(file: Path) -> tuple[list[str], list[str]]:
    r"""Return the tokens of a word list, and notes. `\r` and U+2028 are tokens in published lists, no line ends."""
    tokens = [line.removesuffix("\r") for line in file.read_bytes().decode("utf-8-sig").split("\n")]
    while tokens and not tokens[-1]:  # no text gives an empty token; blank lines at the end come from editors
        tokens.pop()
    free_names, known, renamed = unused_names(tokens), set[str](), []
    for number, token in enumerate(tokens):
        if token in known:
            if not UNUSED.fullmatch(token):
                raise ConfigError(
                    [f"vocabulary ({file}) holds tokens more than once, for example {token!r} in line {number + 1}: "
                     "every line must be distinct"]
                )  # fmt: skip
            renamed.append(token)
            tokens[number] = next(free_names)
        known.add(token)
    notes = [f"{file}: {len(renamed)} repeated lines ({''.join(renamed[:1])}, ...) are unused tokens under other names"]
    return tokens, notes if renamed else []


def unused_names(tokens: Sequence[str]) -> Iterator[str]:
    """Yield names `[unusedN]` that are not among `tokens`."""
    known = set(tokens)
    return (name for number in range(2 * len(tokens)) if (name := f"[unused{number}]") not in known)


# -------------------------------------------------------------------------------------------------- casing and accents


def _settings_in(config: Mapping[str, Any], flags: Mapping[str, bool], *, origin: str) -> dict[str, bool]:
    """Return the normalizer's settings by their names in tokenizer_config.json: those given there or as `flags`."""
    given = {name: value for name in _SETTINGS if (value := config.get(name)) is not None}
    problems = [
        f"{origin}: {name} ({value!r}) in its {TOKENIZER_CONFIG} must be true or false"
        for name, value in given.items()
        if not isinstance(value, bool)
    ]
    problems += [
        f"{origin}: {name} is {given[name]} in its {TOKENIZER_CONFIG}, {value} is set: leave one of them out"
        for name, value in flags.items()
        if given.get(name, value) != value
    ]
    raise_if_any(problems)
    return {**given, **flags}


def _check_normalizer(normalizer: Any, config: Mapping[str, Any], flags: Mapping[str, bool], *, origin: str) -> None:
    """Raise ConfigError if settings contradict the normalizer of a tokenizer.json."""
    is_bert = (normalizer or {}).get("type") == "BertNormalizer"
    if is_bert:
        normalizer.update(bert_normalizer(**{name: normalizer.get(name) for name in _SETTINGS.values()
                                             if name in normalizer}))  # fmt: skip
    wanted = _settings_in(config, flags, origin=origin) if is_bert else dict(flags)
    raise_if_any(
        [
            f"{origin} has its own normalization, which contradicts {name} {value}: leave the setting out (in "
            f"{TOKENIZER_CONFIG} or on the command line), or save the tokenizer again"
            for name, value in wanted.items()
            if not is_bert or normalizer[_SETTINGS[name]] != value
        ]
    )


def _normalizer_of_words(
    tokens: Sequence[str], config: Mapping[str, Any], flags: Mapping[str, bool], *, origin: str
) -> dict[str, Any]:
    """Return the normalizer of a word list. Raises ConfigError for a list that uncased text cannot have made."""
    raise_if_any(
        [
            f"{origin}: {name} ({config[name]!r}) in its {TOKENIZER_CONFIG} is not implemented: give a vocabulary "
            "without it"
            for name, values in _UNSUPPORTED.items()
            if config.get(name, values[0]) not in values
        ]
    )
    given = _settings_in(config, flags, origin=origin)
    normalizer = bert_normalizer(**{_SETTINGS[name]: value for name, value in given.items()})
    if "do_lower_case" not in given:
        _raise_if_cased(tokens, normalizer, origin=origin)
    return normalizer


def _never_read(tokens: Iterable[str], normalizer: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the tokens with capitals, and those with accents, that never occur in text normalized like this."""
    words = [token.removeprefix(CONTINUATION) for token in tokens if not re.fullmatch(r"\[.*\]|<.*>", token)]
    words = [word for word in words if any(character.isalpha() for character in word)]
    cased = [word for word in words if normalizer["lowercase"] and word != word.lower()]
    strips_accents = normalizer["strip_accents"]
    return cased, [word for word in words if strips_accents and not word.isascii() and word != without_accents(word)]


def _notes_on_tokens(specification: Mapping[str, Any], added: Mapping[str, Any], *, origin: str) -> list[str]:
    """Return a note if settings, which are followed, keep text from ever giving some of the tokens."""
    normalizer = specification.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return []
    cased, accented = _never_read(specification["model"]["vocab"].keys() - added.keys(), normalizer)
    never = sorted({*cased, *accented})
    case, accents = normalizer["lowercase"], normalizer["strip_accents"]
    return [
        f"{origin}: {len(never):,} tokens, {never[0]!r} for example, never occur in text that is read as its settings "
        f"say (do_lower_case {case}, strip_accents {accents}): correct them if it is meant otherwise"
    ] if never else []  # fmt: skip


def _raise_if_cased(tokens: Sequence[str], normalizer: Mapping[str, Any], *, origin: str) -> None:
    cased, accented = _never_read(tokens, normalizer)
    if cased:
        raise ConfigError(
            [f"{origin} is cased ({len(cased)} of its tokens, {cased[0]!r} for example, never occur in lower-case "
             f"text): use --cased with prepare-corpus, or put a {TOKENIZER_CONFIG} with "
             '{"do_lower_case": false} beside it']
        )  # fmt: skip
    if accented:
        raise ConfigError(
            [f"{origin} has {len(accented)} tokens, {accented[0]!r} for example, that never occur in text without "
             f"accents: use --keep-accents with prepare-corpus, or put a {TOKENIZER_CONFIG} with "
             '{"do_lower_case": true, "strip_accents": false} beside it']
        )  # fmt: skip


def without_accents(text: str) -> str:
    """Return `text` as BERT strips accents: decomposed, without combining marks."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


# ---------------------------------------------------------------------------------------- special tokens, added words


def _added_tokens(
    specification: Mapping[str, Any], config: Mapping[str, Any], more: Mapping[str, int], *, origin: str
) -> dict[str, dict[str, Any]]:
    """Return the added tokens of all files by content, with their flags and ids."""
    ids: dict[str, int] = specification["model"]["vocab"]
    decoder = config.get("added_tokens_decoder") or {}
    special = [*(config.get("additional_special_tokens") or []), *_names(config.get("extra_special_tokens"))]
    listed = [
        *(specification.get("added_tokens") or []),
        *({**token, "id": int(id)} for id, token in decoder.items()),
        *({"content": content, "id": id} for content, id in more.items()),
    ]
    known = {**ids, **{token["content"]: token["id"] for token in listed}}
    missing = [content for token in special if (content := _content(token)) not in known]
    raise_if_any([f"{origin}: {content!r} is a special token without an id: save the tokenizer again"
                  for content in missing])  # fmt: skip
    flags = {"special": True, "normalized": False}
    listed += [{"content": content, "id": known[content], **flags} for content in map(_content, special)]
    added: dict[str, dict[str, Any]] = {}
    for token in listed:
        content, id = token["content"], ids.get(token["content"], token["id"])
        first = added.setdefault(content, {**_FLAGS, **token, "id": id})
        if first["id"] != token["id"]:
            raise ConfigError([f"{origin}: {content!r} has the ids {first['id']} and {token['id']}: save it again"])
    return added


def _with_special_tokens(
    specification: dict[str, Any], config: Mapping[str, Any], added: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Rename the special tokens in use to ours and unused ones to `[unusedN]`. All other added tokens are words."""
    model = {**bert_specification([])["model"], **specification["model"]}
    words = dict(model["vocab"])
    tokens = {**words, **{content: token["id"] for content, token in added.items()}}
    theirs = {ours: _content(config.get(role)) or ours for role, ours in _ROLES.items()}
    control = [*_CONTROL, *filter(None, (_content(config.get(role)) for role in ("bos_token", "eos_token")))]
    unused = [token for token in dict.fromkeys(control) if token in tokens and token not in theirs.values()]
    names = {name: ours for ours, name in theirs.items()} | dict(zip(unused, unused_names([*tokens]), strict=False))
    words |= {content: tokens[content] for content in names if content in tokens}
    kept = [token for content, token in added.items() if content not in names]
    return {
        **specification,
        "added_tokens": [*_special(names, words), *sorted(kept, key=lambda token: token["id"])],
        "model": {
            **model,
            "unk_token": names.get(model["unk_token"], model["unk_token"]),
            "vocab": {names.get(token, token): id for token, id in sorted(words.items(), key=lambda item: item[1])},
        },
    }


def _special(names: Mapping[str, str], ids: Mapping[str, int]) -> list[dict[str, Any]]:
    special = [(ids[token], name) for token, name in names.items() if name in SPECIAL_TOKENS and token in ids]
    flags = {**_FLAGS, "normalized": False, "special": True}
    return [{"id": id, "content": name, **flags} for id, name in sorted(special)]


def _names(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else tokens or []


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
