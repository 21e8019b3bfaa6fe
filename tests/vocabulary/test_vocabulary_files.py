"""Files of tokenizers: read as `transformers` reads them, or an error; what is written is read back alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.vocabulary.vocabulary import Vocabulary

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "haus", "the", "schon", "un", "##s", "covid", "a", "b", "-", ".", "1", "##1", "<", ">"]
CASED = [*WORDS, "Haus", "schön", "The"]
TEXTS = ["The Haus schön", "covid-19 covids COVID-19 un-1", "haus<e1>a b</e1>", "New York new  york new\nyork."]


def write(folder: Path, tokens: list[str], **settings: Any) -> Path:
    """Write a word list, and a tokenizer_config.json if there are settings."""
    (folder / "vocab.txt").write_bytes("".join(f"{token}\n" for token in tokens).encode())
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def assert_read_as_by_transformers(folder: Path, tmp_path: Path) -> Vocabulary:
    """Compare ids with those of `transformers`, also after writing and reading again; return the vocabulary."""
    transformers = pytest.importorskip("transformers")
    vocabulary, reference = Vocabulary.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    expected = [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    vocabulary.save(written := tmp_path / "written")
    is_word_list = (written / "vocab.txt").is_file()
    for path in (folder, written, written / "tokenizer.json", *([written / "vocab.txt"] if is_word_list else [])):
        again = Vocabulary.load(path)
        assert again.encode_batch(TEXTS) == expected, path
        assert again.fingerprint == vocabulary.fingerprint, path
        assert [ids for ids, _ in again.encode_with_offsets(TEXTS)] == expected
    return vocabulary


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("token", ["\u2028", "##\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "a\rb"])
def test_a_token_of_a_word_list_ends_at_a_line_feed_alone(tmp_path: Path, token: str, end: str):
    tokens = [*WORDS, token, "last"]
    (tmp_path / "words.txt").write_bytes(end.join([*tokens, ""]).encode())
    vocabulary = Vocabulary.load(tmp_path / "words.txt")
    assert list(vocabulary.tokens) == tokens
    vocabulary.save(tmp_path / "written")
    assert (tmp_path / "written" / "vocab.txt").read_bytes() == "".join(f"{token}\n" for token in tokens).encode()
    assert Vocabulary.load(tmp_path / "written" / "vocab.txt").fingerprint == vocabulary.fingerprint


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_at_the_end_of_a_word_list_are_no_tokens(tmp_path: Path, end: str):
    (tmp_path / "vocab.txt").write_bytes(end.join([*WORDS, "", "", ""]).encode())
    assert list(Vocabulary.load(tmp_path).tokens) == WORDS


def test_word_list_that_is_not_utf8_gives_a_short_message(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*WORDS, *map(str, range(9999)), "é"]).encode("latin-1"))
    with pytest.raises(ConfigError, match="can't decode byte 0xe9") as caught:
        Vocabulary.load(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("as_json", [False, True])
def test_tokens_that_settings_never_read_are_noted(tmp_path: Path, as_json: bool):
    write(tmp_path, CASED, do_lower_case=True)
    if as_json:
        Vocabulary.from_tokens(CASED).save(tmp_path)
    (note,) = Vocabulary.load(tmp_path).notes
    assert "'Haus' for example, never occur in text that is read as its settings say (do_lower_case True" in note
    write(tmp_path, CASED, do_lower_case=False)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    assert not Vocabulary.load(tmp_path).notes


def test_repeated_unused_tokens_keep_their_ids(tmp_path: Path):
    tokens = [*WORDS, "[unused1]", "[unused2]", "[unused1]", "end"]
    vocabulary = Vocabulary.load(write(tmp_path, tokens))
    assert (vocabulary.tokens[len(tokens) - 1], vocabulary.size) == ("end", len(tokens))
    assert vocabulary.tokens[len(tokens) - 2] == "[unused0]"
    (note,) = vocabulary.notes
    assert "1 repeated lines ([unused1], ...)" in note


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("Haus", r"vocab.txt\) is cased \(1 of its tokens, 'Haus'.*use --cased.*\"do_lower_case\": false"),
        ("##Ä", "is cased"),
        ("schön", r"1 tokens, 'schön'.*use --keep-accents.*\"strip_accents\": false"),
        ("한국", "use --keep-accents"),  # decomposed by stripping
        ("के", "use --keep-accents"),
    ],
)
def test_word_list_that_uncased_text_cannot_have_made_raises(tmp_path: Path, token: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Vocabulary.load(write(tmp_path, [*WORDS, token]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_lower_case": False}, ["The", "Haus", "schön"]),
        ({"do_lower_case": True}, ["the", "haus", "schon"]),
        ({"do_lower_case": True, "strip_accents": False}, ["the", "haus", "schön"]),
    ],
)
def test_settings_beside_a_word_list_apply(tmp_path: Path, settings: dict[str, bool], expected: list[str]):
    folder = write(tmp_path, CASED, **settings)
    vocabulary = assert_read_as_by_transformers(folder, tmp_path)
    assert [vocabulary.tokens[id] for id in vocabulary.encode_batch(["The Haus schön"])[0]] == expected
    flags = {"cased": not settings["do_lower_case"], "keep_accents": settings.get("strip_accents") is False}
    if any(flags.values()):
        (bare := tmp_path / "bare").mkdir()
        tokens = [token for token in CASED if flags["cased"] or token in SPECIAL or token == token.lower()]
        other = Vocabulary.load(write(bare, tokens), **flags)
        assert other.processing == vocabulary.processing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_lower_case": "false"}, r"do_lower_case \('false'\).*must be true or false"),
        ({"do_lower_case": True}, "do_lower_case is True.*False is set: leave one of them out"),
        ({"do_basic_tokenize": False}, r"do_basic_tokenize \(False\).*not implemented"),
        ({"word_tokenizer_type": "mecab"}, "word_tokenizer_type"),
        ({"added_tokens_decoder": {"1": {"content": "haus"}}}, "'haus' has the ids 5 and 1"),
        ({"added_tokens_decoder": {"99": {"content": "far"}}}, "without gaps"),
        ({"added_tokens_decoder": {"19": "word"}}, "cannot be read"),
        ({"additional_special_tokens": ["<e1>"]}, "'<e1>' is a special token without an id"),
    ],
)
def test_settings_that_cannot_be_followed_raise(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Vocabulary.load(write(tmp_path, WORDS, **settings), cased=True)


def test_settings_that_contradict_a_tokenizer_json_raise(tmp_path: Path):
    Vocabulary.from_tokens(CASED, lowercase=False).save(tmp_path)
    assert Vocabulary.load(tmp_path, cased=True).description == "cased, accents kept"
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ConfigError, match="contradicts do_lower_case True"):
        Vocabulary.load(tmp_path)
    Vocabulary.from_tokens(WORDS).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="contradicts do_lower_case False"):
        Vocabulary.load(tmp_path, cased=True)


def add_words(folder: Path, *, interleaved: bool) -> None:
    """Write a tokenizer.json with added words of several kinds; `interleaved`: [MASK] has an id after theirs."""
    write(folder, WORDS)
    specification = json.loads(Vocabulary.from_tokens(WORDS).exported_json)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    words: list[dict[str, Any]] = [
        {"content": "covid", "single_word": True},
        {"content": "covid-19"},
        {"content": "New York"},
        {"content": "<e1>", "special": True, "normalized": False},
    ]
    ids = specification["model"]["vocab"]
    if interleaved:
        del ids["covid"], ids["[MASK]"]
        specification["model"]["vocab"] = ids = {token: id for id, token in enumerate(ids)}
        words.append({"content": "[MASK]", "special": True, "normalized": False})
    special = [{**flags, "special": True, "id": ids[token], "content": token} for token in SPECIAL if token in ids]
    new = iter(range(len(ids), 99))
    added = [{**flags, **word, "id": ids[word["content"]] if word["content"] in ids else next(new)} for word in words]
    specification.update(added_tokens=special + added, post_processor=None)
    (folder / "tokenizer.json").write_text(json.dumps(specification))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]", "unk_token": "[UNK]"})
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_added_words_are_read_with_their_flags(tmp_path: Path, interleaved: bool):
    add_words(tmp_path, interleaved=interleaved)
    vocabulary = assert_read_as_by_transformers(tmp_path, tmp_path)
    assert (tmp_path / "written" / "vocab.txt").is_file() != interleaved
    assert set(vocabulary.words) == {"covid", "covid-19", "New York", "<e1>"}
    ids = vocabulary.encode_batch(["covid-19 [MASK] <e1>"])[0]
    assert vocabulary.mask_id not in ids
    assert {"covid-19", "<e1>"} <= {vocabulary.tokens[id] for id in ids}
    assert "new york" not in vocabulary.decode(vocabulary.encode_batch(["in new york"])[0])


def test_added_tokens_json_is_read(tmp_path: Path):
    write(tmp_path, CASED, do_lower_case=False)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"covid-19": len(CASED), "New York": len(CASED) + 1}))
    vocabulary = assert_read_as_by_transformers(tmp_path, tmp_path)
    assert vocabulary.words == ("covid-19", "New York")


def test_settings_of_several_models_in_a_folder_are_told_apart(tmp_path: Path):
    write(tmp_path, WORDS, do_lower_case=True)
    (tmp_path / "vocab.txt").rename(tmp_path / "big-vocab.txt")
    (tmp_path / "big-tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Vocabulary.load(tmp_path / "big-vocab.txt").description == "cased, accents kept"


def test_fingerprint_covers_everything_that_reads_text(tmp_path: Path):
    variants = [
        Vocabulary.from_tokens(WORDS),
        Vocabulary.from_tokens(WORDS, lowercase=False),
        Vocabulary.from_tokens(WORDS, strip_accents=False),
        Vocabulary.from_tokens(WORDS, cut_words=True),
        Vocabulary.from_tokens([*WORDS, "covid-19"]),
        Vocabulary.load(write(tmp_path, WORDS, added_tokens_decoder={str(len(WORDS)): {"content": "covid-19"}})),
    ]
    assert len({vocabulary.fingerprint for vocabulary in variants}) == len(variants)
    assert Vocabulary.from_tokens(WORDS, strip_accents=True).fingerprint == variants[0].fingerprint


def test_half_of_a_surrogate_pair_raises(tmp_path: Path):
    specification = json.loads(Vocabulary.from_tokens(WORDS).exported_json)
    specification["model"]["vocab"]["\ud800"] = len(WORDS)
    (tmp_path / "tokenizer.json").write_text(json.dumps(specification))
    with pytest.raises(ConfigError, match="cannot be read"):
        Vocabulary.load(tmp_path)
