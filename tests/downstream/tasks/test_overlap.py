"""ROUGE and BLEU in every script: equal texts score 100, ASCII words are those of rouge-score."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pmlm_dist.downstream.tasks.overlap import bleu_signature, bleu_tokenizer, overlap_scores, text_words

METRICS = {"rouge1", "rouge2", "rougeL", "bleu"}
TEXTS = {  # text: sacrebleu's tokenizer
    "The cat sat on the mat.": "13a",
    "Füße, café und Überraschung!": "13a",
    "今天天气很好。": "zh",
    "用 GPU 加速 training": "zh",
    "今日はとてもいい天気です。": "char",
    "สวัสดีชาวโลก": "char",
    "안녕하세요 세계, 반갑습니다": "intl",
    "Привет, мир! Как дела?": "intl",
    "हिन्दी में लिखी हुई किताब।": "intl",
    "كيف حالك اليوم يا صديقي": "intl",
    "می\u200cخواهم به خانه بروم": "intl",
    "fish": "13a",
    "猫": "zh",
    "हाँ": "intl",
    "7": "13a",
    "?!": "13a",
    "👍🏽🎉": "13a",
}


@pytest.mark.parametrize(("text", "tokenizer"), TEXTS.items())
def test_equal_texts_score_100_in_any_script(text: str, tokenizer: str):
    assert overlap_scores([text], [text]) == pytest.approx(dict.fromkeys(METRICS, 100.0))
    assert max(overlap_scores([text], [text]).values()) <= 100
    other = "cat" if not text.isascii() or "cat" not in text.lower() else "猫"
    assert overlap_scores([other], [text]) == dict.fromkeys(METRICS, 0.0)
    assert overlap_scores([""], [text]) == dict.fromkeys(METRICS, 0.0)
    assert bleu_tokenizer([text]) == tokenizer


def test_texts_without_spaces_are_compared_by_character():
    scores = overlap_scores(["今天天气不好。"], ["今天天气很好。"])  # common: 5 of 6 characters, 3 of 5 bigrams
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx(500 / 6)
    assert scores["rouge2"] == pytest.approx(60)
    assert 40 < scores["bleu"] < 60


def test_words_keep_marks_and_lose_invisible_characters():
    assert text_words("हिन्दी किताब") == ["हिन्दी", "किताब"]
    assert text_words("می\u200cخواهم") == text_words("میخواهم")
    assert text_words("ＧＰＵ加速, cats") == ["gpu", "加", "速", "cat"]
    assert overlap_scores(["हिन्दी"], ["हन्द"])["rouge1"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_ascii_texts_equal_those_of_rouge_score(seed: int):
    draw = random.Random(seed)
    words = [
        "The",
        "the",
        "running",
        "runs",
        "Don't",
        "well-known",
        "3.5",
        "CNN's",
        "(a)",
        "foo_bar",
        "end.",
        ",",
        "<b>",
    ]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for _ in range(50):
        prediction, reference = (" ".join(["a", *draw.choices(words, k=draw.randint(2, 12))]) for _ in range(2))
        scores = overlap_scores([prediction], [reference])
        for name, score in scorer.score(reference, prediction).items():
            assert scores[name] == pytest.approx(100 * score.fmeasure), (prediction, reference)


def test_bleu_tokenizer_is_that_of_most_words_and_in_the_signature():
    assert bleu_tokenizer(["An English text with one name, 北京.", "And another."]) == "13a"
    assert bleu_tokenizer(["今天天气很好。", "ok"]) == "zh"
    assert "tok:zh" in bleu_signature(["今天天气很好。"])
    assert "eff:yes" in bleu_signature(["a"])
