"""`pmlm inspect`: the model input of one sample, in the terminal and as a picture.

    corpus --SplitReader--> token ids --BatchSource--> Batch of one --slots_of--> Slots --> text, table, matrix, PNG

Spans, orders and visibility are those of the batch that training gets for the same (seed, epoch, sample); nothing is
recomputed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pmlm_dist.commands.plot import save_picture
from pmlm_dist.config import MaskingConfig, raise_if_any
from pmlm_dist.corpus.shards import TRAIN
from pmlm_dist.data.batch import Batch, special_ids
from pmlm_dist.data.loader import BatchSource
from pmlm_dist.data.stream import CorpusSource, SplitReader
from pmlm_dist.masking.visibility import visibility_matrix
from pmlm_dist.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["context", "original", "pseudo"]

COLORS: dict[Kind, str] = {"context": "#5b7aa6", "original": "#2f9e78", "pseudo": "#e07a3f"}
NAMES: dict[Kind, str] = {"context": "context", "original": "originals", "pseudo": "pseudo masks"}
STEP_COLORS = ("#b05fc4", "#c79a1b", "#1fa0b4", "#d6527b", "#7f9f2f", "#8a7a68")
_ROWS: dict[Kind, int] = {"context": 0, "original": 1, "pseudo": 2}
_CELLS: dict[Kind, str] = {"context": "#c9d4e5", "original": "#8fd0b5", "pseudo": "#f3b890"}
_INK, _FAINT = "#26303d", "#e4e8ed"
_CAPTION = """AE predicts each masked token independently, at its [M].
PAR predicts the tokens of step k together, at their [P], given the originals of earlier steps."""


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `pmlm inspect`."""

    corpus: Path = Path("data/demo")
    """Corpus folder, written by `pmlm prepare-corpus`."""
    sample: int = 0
    """Index of the sample in the training split."""
    epoch: int = 0
    """Epoch of the masks."""
    seed: int = 0
    """Seed of the masks (`train.seed` of the run)."""
    window: int = 24
    """Context tokens in table, matrix and picture; the text above them is not limited."""
    start: int | None = None
    """First position of the window. None: a window with the first factorization step."""
    png: Path | None = None
    """File for a picture of layout and visibility."""
    example: bool = False
    """Draw a small example into `png` instead of a sample; needs no corpus."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass(frozen=True)
class Slot:
    """One slot of the layout, with its printed token."""

    token: str
    """Input token; [P] for a pseudo mask, [M] for a masked context slot."""
    position: int
    segment: int
    order: int
    """0 context, +k original, -k pseudo mask of step k."""
    step: int = 0
    """Factorization step that predicts this slot's position; 0: not predicted."""

    @property
    def kind(self) -> Kind:
        return "context" if self.order == 0 else "original" if self.order > 0 else "pseudo"


def inspect(config: InspectConfig, *, console: Console | None = None) -> None:
    """Print one sample: text with numbered spans, slots, visibility matrix; write the picture if `png` is set.

    Raises ConfigError for a missing corpus or sample, and ShardError for a corrupt shard.
    """
    console = console or Console()
    if config.example:
        raise_if_any([] if config.png else ["--example draws a picture: give its file by --png FILE"])
        console.print(_matrix_text(example_slots(), console.width))
        _write_picture(example_slots(), config.png, console)
        return
    vocabulary = Vocabulary.load(config.corpus)
    slots = slots_of(_batch_of_one(config, vocabulary), vocabulary)
    selected = _in_window(slots, start=config.start, window=config.window)
    console.print(
        Group(
            _headline(slots, config),
            Panel(_text_with_spans(slots), title="text with the spans of each factorization step", title_align="left"),
            _prediction_table(selected),
            _matrix_text(selected, console.width),
        )
    )
    _write_picture(selected, config.png, console)


def _write_picture(slots: Sequence[Slot], png: Path | None, console: Console) -> None:
    if png is not None:
        draw_layout(slots, path=png)
        console.print(f"picture: {png}")


def slots_of(batch: Batch, vocabulary: Vocabulary) -> list[Slot]:
    """Return the valid slots of the first sample of a batch, in layout order."""
    used, valid = batch.weights_BM[0] > 0, batch.valid_BT[0]
    orders = batch.order_BT[0, batch.num_context : batch.num_context + batch.num_predictions][used].tolist()
    steps = dict(zip(batch.predicted_BM[0, used].tolist(), orders, strict=True))
    columns = (batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.order_BT)
    slots = []
    for token, position, segment, order in zip(*(column[0, valid].tolist() for column in columns), strict=True):
        text = "[P]" if order < 0 else "[M]" if token == vocabulary.mask_id else vocabulary.tokens[token]
        slots.append(Slot(text, position, segment, order, step=steps.get(position, 0)))
    return slots


def example_slots() -> list[Slot]:
    """Return a sentence of eight tokens; step 1 predicts a span of two tokens, step 2 a single token."""
    tokens = ["[CLS]", "the", "cat", "sat", "on", "a", "mat", "[SEP]"]
    steps = {4: 1, 5: 1, 2: 2}
    context = [Slot("[M]" if at in steps else token, at, 0, 0, steps.get(at, 0)) for at, token in enumerate(tokens)]
    originals = [Slot(tokens[at], at, 0, step, step) for at, step in steps.items()]
    pseudo = [Slot("[P]", at, 0, -step, step) for at, step in steps.items()]
    return [*context, *originals, *pseudo]


def _batch_of_one(config: InspectConfig, vocabulary: Vocabulary) -> Batch:
    corpus = CorpusSource(config.corpus)
    reader = SplitReader(corpus, split=TRAIN)
    if not 0 <= config.sample < len(reader):
        raise_if_any([f"sample ({config.sample}) must lie between 0 and {len(reader) - 1}, the last training sample"])
    sample = reader.sample(config.sample)._replace(epoch=config.epoch)
    reader.close()
    source = BatchSource(corpus, special=special_ids(vocabulary), masking=config.masking, seed=config.seed)
    return source.batch([sample], seed=config.seed)


def _in_window(slots: Sequence[Slot], *, start: int | None, window: int) -> list[Slot]:
    length = sum(slot.kind == "context" for slot in slots)
    first = min((slot.position for slot in slots if slot.order == 1), default=0)
    start = max(0, min(first - window // 3, length - window)) if start is None else start
    return [slot for slot in slots if start <= slot.position < start + window]


# ----------------------------------------------------------------------------------------------------------- terminal


def _headline(slots: Sequence[Slot], config: InspectConfig) -> Text:
    context = [slot for slot in slots if slot.kind == "context"]
    predicted = [slot for slot in context if slot.step]
    steps = max((slot.step for slot in predicted), default=0)
    numbers = f"{len(context)} tokens, {len(predicted)} predicted in {steps} steps, {len(slots)} slots"
    return Text.assemble(
        (f"sample {config.sample}", "bold"), f"  epoch {config.epoch}  seed {config.seed}   ", (numbers, "dim")
    )


def _color(step: int) -> str:
    return STEP_COLORS[(step - 1) % len(STEP_COLORS)]


def _text_with_spans(slots: Sequence[Slot]) -> Text:
    """Return the original text; each span has the color of its step and starts with the step's number."""
    originals = {slot.position: slot.token for slot in slots if slot.kind == "original"}
    text, last_step = Text(), 0
    for slot in slots:
        if slot.kind != "context":
            break
        token = originals.get(slot.position, slot.token)
        joined = token.startswith("##") and slot.step == last_step
        text.append("" if joined or not text else " ")
        if slot.step and slot.step != last_step:
            text.append(f"{slot.step}:", style=f"dim {_color(slot.step)}")
        style = f"bold {_color(slot.step)} underline" if slot.step else "dim" if token.startswith("[") else ""
        text.append(token[2:] if joined else token, style=style)
        last_step = slot.step
    return text


def _prediction_table(slots: Sequence[Slot]) -> Table:
    """Return a table with one row per predicted position; its three slots share position and segment."""
    table = Table(title="the three slots of each predicted position in the window", title_justify="left")
    for name in ("step", "position", "segment"):
        table.add_column(name, justify="right")
    table.add_column("context slot (order 0)", style=COLORS["context"])
    table.add_column("original (order +k)", style=COLORS["original"])
    table.add_column("pseudo mask (order -k)", style=COLORS["pseudo"])
    context = {slot.position: slot for slot in slots if slot.kind == "context"}
    for slot in slots:
        if slot.kind == "original":
            step = Text(str(slot.step), style=_color(slot.step))
            masked = Text(context[slot.position].token)
            original, pseudo = Text(f"{slot.token}  +{slot.step}"), Text(f"[P]  -{slot.step}")
            table.add_row(step, str(slot.position), str(slot.segment), masked, original, pseudo)
    return table


def _matrix_text(slots: Sequence[Slot], columns: int) -> Text:
    """Return the matrix: rows are queries, columns are keys; a visible key is a cell in the color of its group.

    A cell is two characters wide if the `columns` of the terminal suffice, else one.
    """
    width = max((len(slot.token) for slot in slots), default=0)
    cell = 2 if width + 5 + 2 * len(slots) <= columns else 1
    text = Text("visibility among ", style="italic")
    for kind, name in NAMES.items():
        text.append(f"{name}  ", style=COLORS[kind])
    text.append("(above: step): rows attend to the filled columns\n" + " " * (width + 5))
    for slot in slots:
        text.append(f"{abs(slot.order):>2}"[-cell:], style=f"not italic {COLORS[slot.kind]}")
    for slot, visible in zip(slots, _matrix(slots), strict=True):
        text.append(f"\n{slot.token:>{width}} {_signed(slot.order):>3} ", style=f"not italic {COLORS[slot.kind]}")
        for key, is_visible in zip(slots, visible, strict=True):
            style = f"not italic {COLORS[key.kind]}" if is_visible else "dim"
            text.append("█" * cell if is_visible else "·".rjust(cell), style=style)
    return text


def _matrix(slots: Sequence[Slot]) -> np.ndarray:
    return visibility_matrix(np.array([slot.order for slot in slots], dtype=np.int32))


# ------------------------------------------------------------------------------------------------------------ picture


def draw_layout(slots: Sequence[Slot], *, path: Path) -> None:
    """Write a picture of the slots over their positions and of the visibility matrix; the suffix sets the format.

    The two are side by side for up to ten context slots, else one above the other.
    """
    from matplotlib.figure import Figure

    columns = 1 + max(slot.position for slot in slots) - min(slot.position for slot in slots)
    width, height, side = 0.78 * columns + 1.1, 3.6, 0.31 * len(slots) + 1.1
    side_by_side = columns <= 10
    size = (width + side + 0.3, max(height, side)) if side_by_side else (max(width, side), side + height)
    figure = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    if side_by_side:
        left, right = figure.subplots(1, 2, width_ratios=[width, side])
    else:
        left, right = figure.subplots(2, 1, height_ratios=[height, side])
    _draw_slots(left, slots)
    _draw_matrix(right, slots)
    save_picture(figure, path, bbox_inches="tight", pad_inches=0.15)


def _draw_slots(axes: Axes, slots: Sequence[Slot]) -> None:
    """Draw three rows of boxes; the slots of a position share a column, spans are shaded."""
    from matplotlib.patches import Rectangle

    positions = sorted({slot.position for slot in slots})
    for slot in slots:
        if slot.kind == "original":
            corner, color = (slot.position - 0.5, -0.42), _color(slot.step)
            axes.add_patch(Rectangle(corner, 1, 3.17, color=color, alpha=0.13, linewidth=0))
        _draw_slot(axes, slot)
    for step in sorted({slot.step for slot in slots} - {0}):
        middle = float(np.mean([slot.position for slot in slots if slot.order == step]))
        axes.text(middle, 2.55, f"step {step}", color=_color(step), fontweight="bold", **_label(8))
    axes.text(positions[0] - 0.45, 2.95, _CAPTION, color=_INK, fontsize=8.5, va="top", linespacing=1.5)
    axes.set(xlim=(positions[0] - 0.5, positions[-1] + 0.5), ylim=(3.7, -0.5), aspect="equal")
    axes.set_xticks(positions)
    axes.set_yticks(list(_ROWS.values()), [NAMES[kind] for kind in _ROWS])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, colors=_INK)
    for kind, label in zip(_ROWS, axes.get_yticklabels(), strict=True):
        label.set(color=COLORS[kind], fontweight="bold")
    axes.set_title("slots over their positions (small: order)", fontsize=10, color=_INK, loc="left", pad=10)
    axes.spines[:].set_visible(False)


def _draw_slot(axes: Axes, slot: Slot) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = slot.position, _ROWS[slot.kind]
    hidden = slot.kind == "context" and slot.step > 0
    box = FancyBboxPatch(
        (x - 0.44, y - 0.3),
        0.88,
        0.6,
        boxstyle="round,pad=0,rounding_size=0.09",
        facecolor="white" if hidden else _CELLS[slot.kind],
        edgecolor=COLORS[slot.kind],
        linestyle="--" if hidden else "-",
        linewidth=1.2,
    )
    axes.add_patch(box)
    token = slot.token if len(slot.token) <= 8 else f"{slot.token[:7]}…"
    axes.text(x, y - 0.07, token, color=_INK, **_label(9 if len(token) <= 6 else 7))
    axes.text(x, y + 0.18, _signed(slot.order), color=_INK, **_label(7))


def _draw_matrix(axes: Axes, slots: Sequence[Slot]) -> None:
    """Draw the matrix: visible keys in the color of their group, lines between groups."""
    from matplotlib.colors import to_rgb

    visible = _matrix(slots)
    key_colors = np.array([to_rgb(_CELLS[slot.kind]) for slot in slots])
    pixels = np.where(visible[:, :, None], key_colors[None, :, :], 1.0)
    axes.imshow(pixels, interpolation="nearest")
    edges = [at - 0.5 for at in range(len(slots) + 1)]
    changes = [at - 0.5 for at in range(1, len(slots)) if slots[at].kind != slots[at - 1].kind]
    for draw in (axes.hlines, axes.vlines):
        draw(edges, edges[0], edges[-1], colors=_FAINT, linewidth=0.6)
        draw(changes, edges[0], edges[-1], colors=_INK, linewidth=1.2)
    labels = [f"{slot.token} {_signed(slot.order)}" for slot in slots]
    axes.set_xticks(range(len(slots)), labels, rotation=90)
    axes.set_yticks(range(len(slots)), labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    for label, slot in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], [*slots, *slots], strict=True):
        label.set_color(COLORS[slot.kind])
    axes.set_title("visibility: rows attend to the filled columns", fontsize=10, color=_INK, loc="left", pad=10)
    axes.spines[:].set_visible(False)


def _label(size: float) -> dict[str, Any]:
    return {"ha": "center", "va": "center", "fontsize": size}


def _signed(order: int) -> str:
    return f"{order:+d}".replace("-", "−") if order else "0"
