"""`pmlm inspect`: slots and visibility matrix against the batch of training and the visibility rule."""

import numpy as np
import pytest
from rich.console import Console

from pmlm_dist.commands.inspect import InspectConfig, draw_layout, example_slots, inspect
from pmlm_dist.config import ConfigError


def printed(config: InspectConfig, *, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    inspect(config, console=console)
    return console.export_text()


def parse_matrix(text: str, *, slots: int, cell: int) -> np.ndarray:
    """Return the printed matrix as booleans [slots, slots]."""
    rows = text.split("filled columns\n")[1].splitlines()[1 : slots + 1]
    return np.array([[row[-cell * slots :][cell * k + cell - 1] == "█" for k in range(slots)] for row in rows])


@pytest.mark.parametrize(("width", "cell"), [(100, 2), (30, 1)])
def test_example_matrix_equals_visibility_rule(width, cell, tmp_path):
    slots = example_slots()
    text = printed(InspectConfig(example=True, png=tmp_path / "example.png"), width=width)
    for q, row in zip(slots, parse_matrix(text, slots=len(slots), cell=cell), strict=True):
        for k, is_visible in zip(slots, row, strict=True):
            if q.kind == "context":
                expected = k.kind == "context"
            elif q.kind == "original":
                expected = k.kind == "context" or (k.kind == "original" and k.step <= q.step)
            else:
                earlier = k.kind == "original" and k.step < q.step
                expected = k.kind == "context" or earlier or (k.kind == "pseudo" and k.step == q.step)
            assert is_visible == expected, (q, k)


def test_predicted_position_has_three_slots():
    slots = example_slots()
    for pseudo in (slot for slot in slots if slot.kind == "pseudo"):
        at_position = [slot for slot in slots if slot.position == pseudo.position]
        assert sorted(slot.kind for slot in at_position) == ["context", "original", "pseudo"]
        assert {slot.step for slot in at_position} == {pseudo.step}


def test_sample_is_printed_with_its_predictions(small_corpus):
    text = printed(InspectConfig(corpus=small_corpus, sample=3, window=32), width=160)
    assert "32 tokens, 5 predicted" in text
    body = text.split("visibility")[0]
    assert body.count("[P]") == 5
    assert "[CLS]" in body
    assert "1:" in body


def test_inspect_and_draw_layout_write_pictures(small_corpus, tmp_path):
    printed(InspectConfig(corpus=small_corpus, png=tmp_path / "a.png"))
    draw_layout(example_slots(), path=tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sample", [-1, 96])
def test_sample_out_of_range_raises_with_range(small_corpus, sample):
    with pytest.raises(ConfigError, match="95"):
        printed(InspectConfig(corpus=small_corpus, sample=sample))


def test_example_without_png_raises():
    with pytest.raises(ConfigError, match="--png"):
        printed(InspectConfig(example=True))
