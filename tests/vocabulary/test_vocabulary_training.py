"""Trained vocabularies: every script keeps its text, and words that are always [UNK] are not trained on."""

import random

import pytest

from pmlm_dist.vocabulary.vocabulary import Vocabulary

WORDS = {
    "Hindi": "हिन्दी भारत की भाषा है और यह देवनागरी लिपि में लिखी जाती है पानी किताब स्कूल",
    "Thai": "ภาษา ไทย ที่ เป็น ประเทศ น้ำ กรุงเทพ การ ผู้ เรียน หนังสือ โรงเรียน",
    "Arabic": "اللغة العربية هي أكثر اللغات السامية تحدثا وإحدى أكثر اللغات انتشارا في العالم مدرسة",
    "Korean": "한국어 는 한국 의 언어 이다 서울 학교 책 물",
    "German": "Die Brücke über den Fluß ist schön und groß",
}


def unknown_share(vocabulary: Vocabulary, texts: list[str]) -> float:
    ids = [id for encoded in vocabulary.encode_batch(texts) for id in encoded]
    return ids.count(vocabulary.unk_id) / len(ids)


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize("space", [" ", ""])
def test_scripts_keep_their_marks(language: str, space: str):
    """Thai without spaces has words of any length; elsewhere words are shorter than 100 characters."""
    rng = random.Random(0)
    length = 60 if space or language == "Thai" else 6
    texts = [space.join(rng.choices(WORDS[language].split(), k=length)) for _ in range(200)]
    vocabulary = Vocabulary.train(texts, 300)
    assert unknown_share(vocabulary, texts) < 0.01
    decoded = [vocabulary.decode(ids) for ids in vocabulary.encode_batch(texts[:20])]
    assert [text.replace(" ", "") for text in decoded] == [text.lower().replace(" ", "") for text in texts[:20]]
    assert vocabulary.notes[0].startswith("accents are kept")


def test_accents_of_english_are_stripped_unless_they_are_kept():
    text = "The café at the river is an old house in the mountains, as everybody there would tell a visitor."
    texts = [text] * 3 + ["A house without accents."]
    uncased = Vocabulary.train(texts, 120)
    assert (uncased.description, uncased.notes) == ("uncased, accents stripped", ())
    assert uncased.decode(uncased.encode_batch(["The café"])[0]) == "the cafe"
    kept = Vocabulary.train(texts, 120, keep_accents=True)
    assert kept.decode(kept.encode_batch(["The café"])[0]) == "the café"
    cased = Vocabulary.train(texts, 120, cased=True)
    assert cased.decode(cased.encode_batch(["The café"])[0]) == "The café"


def test_three_thousand_chinese_characters_fit_a_vocabulary_of_8192():
    rng = random.Random(0)
    characters = [chr(0x4E00 + number) for number in range(3000)]
    texts = ["".join(rng.choices(characters, k=300)) + "。" for _ in range(200)]
    vocabulary = Vocabulary.train(texts, 8192)
    assert vocabulary.size <= 8192
    assert unknown_share(vocabulary, texts) < 0.002
    assert unknown_share(Vocabulary.train(texts, 8192, coverage=1.0), texts) == 0.0
    assert unknown_share(Vocabulary.train(texts, 8192, coverage=0.9), texts) == pytest.approx(0.1, abs=0.02)


def test_words_that_become_unknown_are_not_trained_on():
    """Neither words of more than 100 characters nor those of rare characters take tokens from ordinary words."""
    rng = random.Random(0)
    ordinary = ["the river sees the old garden number one."] * 500
    junk = ["".join(rng.choices("qxzj", k=3000)) for _ in range(20)]
    rare = ["gard☃iver gard☃iver"]
    vocabulary = Vocabulary.train(ordinary + junk + rare, 200, coverage=0.999)
    assert vocabulary.tokens == Vocabulary.train(ordinary, 200).tokens
    assert {"the", "river", "garden"} <= set(vocabulary.tokens)
    assert vocabulary.encode_batch(junk[:1]) == [[vocabulary.unk_id]]
