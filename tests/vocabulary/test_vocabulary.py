import json
import pickle
import random
from pathlib import Path

import pytest

from pmlm_dist.config import ConfigError
from pmlm_dist.vocabulary.vocabulary import SPECIAL_TOKENS, Vocabulary

WORDS = ["the", "model", "reads", "masked", "spans", "transformers", "tokenization", "Straße", "café", "naïve", "don't"]


def sentences(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=20)) for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(sentences(200), 200)


def test_special_tokens_have_the_first_ids(vocabulary: Vocabulary):
    assert [vocabulary.tokens[id] for id in range(5)] == list(SPECIAL_TOKENS)
    ids = (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id)
    assert ids == vocabulary.special_ids == (0, 1, 2, 3, 4)


def test_training_is_deterministic_and_independent_of_text_order():
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(random.__file__).parent.glob("a*.py"))]
    fingerprints = set()
    for attempt in range(4):
        random.Random(attempt).shuffle(texts)
        fingerprints.add(Vocabulary.train(texts, 1000).fingerprint)
    assert len(fingerprints) == 1


def test_trained_size_is_exact_and_padded_to_a_multiple():
    vocabulary = Vocabulary.train(sentences(50), 90)
    assert vocabulary.size == 90
    assert (vocabulary.padded_size(), vocabulary.padded_size(30), vocabulary.padded_size(8)) == (128, 90, 96)


def test_too_small_size_raises():
    with pytest.raises(ConfigError, match=r"vocabulary_size \(10\) is below"):
        Vocabulary.train(sentences(5), 10)


def test_saved_files_load_equal(vocabulary: Vocabulary, tmp_path: Path):
    vocabulary.save(tmp_path)
    texts = ["Reads MASKED spans", "unknown ☃ don't"]
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "vocab.txt"):
        loaded = Vocabulary.load(path)
        assert loaded.fingerprint == vocabulary.fingerprint
        assert loaded.encode_batch(texts) == vocabulary.encode_batch(texts)


def test_encoding_equals_the_bert_tokenizer_of_transformers(vocabulary: Vocabulary, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    vocabulary.save(tmp_path)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*sentences(3), "Café, naïve\u00a0Straße! tokenizationx"]:
        assert vocabulary.encode_batch([text])[0] == reference(text, add_special_tokens=False)["input_ids"]
        assert reference(text)["input_ids"] == [2, *vocabulary.encode_batch([text])[0], 3]


def test_special_tokens_in_a_text_are_ordinary_text(vocabulary: Vocabulary):
    ids = vocabulary.encode_batch(["[SEP] reads [MASK] [CLS][PAD]"])[0]
    assert not {vocabulary.sep_id, vocabulary.mask_id, vocabulary.cls_id, vocabulary.pad_id} & set(ids)


def test_decode_inverts_encode(vocabulary: Vocabulary):
    ids = vocabulary.encode_batch(["The Model reads masked spans"])[0]
    assert vocabulary.decode(ids) == "the model reads masked spans"
    assert vocabulary.decode([2, *ids, 3]) == "[CLS] the model reads masked spans [SEP]"


def test_used_vocabulary_can_be_pickled(vocabulary: Vocabulary):
    before = vocabulary.encode_batch(["masked spans"])
    assert pickle.loads(pickle.dumps(vocabulary)).encode_batch(["masked spans"]) == before


def test_unused_tokens_are_special(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[unused0]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n[unused17]\n")
    vocabulary = Vocabulary.load(tmp_path / "vocab.txt")
    assert vocabulary.special_ids == (0, 1, 2, 3, 4, 5, 7)
    assert vocabulary.mask_id == 5


def test_missing_special_tokens_are_named(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(ConfigError, match=r"vocab.txt lacks the special tokens \[SEP\] \[MASK\]"):
        Vocabulary.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (json.dumps({"model": {"type": "BPE", "vocab": {}}}), "holds a BPE model, not WordPiece"),
        (json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0, "b": 2}}}), "without gaps"),
    ],
)
def test_unsupported_files_raise(tmp_path: Path, content: str, message: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Vocabulary.load(tmp_path)


def test_missing_file_raises(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        Vocabulary.load(tmp_path / "nothing.txt")


def test_repeated_tokens_raise(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\nword\n")
    with pytest.raises(ConfigError, match="'word'"):
        Vocabulary.load(tmp_path / "vocab.txt")
