"""Incremental forward pass: the context is computed once, and each step computes its new slots only.

    start    context (order 0) --> keys and values of every layer, one copy for each sample
    step k   originals of step k - 1 | pseudo masks of step k  --> logits of the pseudo masks
             (keys and values cached)  (cached for this step only)

The model and the visibility rule are those of training (`masking/visibility.py`): the context has order 0, originals of
step k order +k, pseudo masks of step k order -k. Generation from left to right has one position per step; infilling has
any positions in any order.

Beams are hypotheses of one sample that share its context. The keys and values of a step are written once, into the
cache columns of its beam, and never moved. A hypothesis is the list of beams that hold its columns
(`_Columns.beam_BKC`), so reordering the beams changes small integers only:

    keys of a sample      [ context S | step 1: beams 0..K-1 | step 2: beams 0..K-1 | ... | pseudo masks of this step ]
    visible to a beam       all         its own ancestor       its own ancestor             its own

One product computes the scores of all beams of a sample against these keys. The bias of keys that belong to other
hypotheses is minus infinity.

Legend: B samples, K and J beams, S context slots, A originals and P pseudo masks of a step, Q = A + P, C columns,
T = S + C keys, X = Q * K and Y queries over all beams, H heads of this rank, D head size, E hidden size, N distances,
V vocabulary.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.visibility import visible
from pmlm_dist.model.attention import Slots, attention_backend
from pmlm_dist.model.relative_position import look_up
from pmlm_dist.model.transformer import Layer, PseudoMaskedLM
from pmlm_dist.parallel.cross_entropy import gather_logits

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Context slots: the source, or a text with masks; padding may be on either side.

    `positions_BS` must increase by one within the valid slots of a sample.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor
    valid_BS: Tensor


@dataclass(frozen=True)
class Appended:
    """Input of a step: A originals of the previous step and P pseudo masks."""

    originals_BAK: Tensor
    """Tokens of the originals."""
    positions_BQ: Tensor
    """Positions of originals and pseudo masks, originals first; equal for all beams."""
    segments_BQ: Tensor
    """Segments in the same order."""
    parents_BK: Tensor | None = None
    """Index of the previous step's beam that each beam extends; None: itself."""


@dataclass
class _Columns:
    """Cache columns of the originals of all steps so far: C columns of K beams each."""

    order_C: Tensor
    positions_BC: Tensor
    beam_BKC: Tensor
    """Index of the beam that holds a column of hypothesis K."""


class DecodingSession:
    """Decoding state of a batch, advanced by `step`. The model must be in evaluation mode and is not changed."""

    def __init__(self, model: PseudoMaskedLM, context: Context, *, mask_id: int, beams: int, capacity: int):
        """Compute keys and values of the context.

        `capacity`: maximum number of slots of a beam, that is all originals and the pseudo masks of the last step.
        """
        assert not model.training, "decoding needs evaluation mode: dropout would make it random"
        self._model, self._mask_id = model, mask_id
        self._layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        self._context, self._step = context, 0
        batch, self._num_context = context.tokens_BS.shape
        empty_BC = context.positions_BS.new_empty(batch, 0)
        self._columns = _Columns(empty_BC[0], empty_BC, empty_BC[:, None])
        self._bias_HN = None
        if model.relative_bias is not None:
            self._bias_HN = model.relative_bias.by_distance(model.relative_bias.max_distance).detach()
        # Allocated once for all steps: growing the cache by concatenation would copy all of it in every step.
        self._caches = _encode(model, context, room=capacity * beams)

    @torch.no_grad()
    def step(self, appended: Appended) -> Tensor:
        """Logits [B, P, K, V] over the whole vocabulary without padding rows, equal on tensor-parallel peers.

        The first step may have a single beam, since all hypotheses are still equal.
        """
        originals_BAK, model = appended.originals_BAK, self._model
        batch, num_originals, beams = originals_BAK.shape
        num_pseudo = appended.positions_BQ.shape[1] - num_originals
        self._step += 1
        order_Q = torch.tensor(
            [self._step - 1] * num_originals + [-self._step] * num_pseudo, device=originals_BAK.device
        )
        columns = self._extended(appended, order_Q)
        bias = self._bias(appended, order_Q, columns)
        pseudo_BPK = originals_BAK.new_full((batch, num_pseudo, beams), self._mask_id)
        tokens_BQK = torch.cat([originals_BAK, pseudo_BPK], dim=1)
        x_BQKE = model.embeddings(tokens_BQK, appended.positions_BQ[..., None], appended.segments_BQ[..., None])
        start = self._num_context + self._columns.order_C.numel() * beams
        x_BXE = x_BQKE.flatten(1, 2)
        *inner, last = zip(self._layers, self._caches, strict=True)
        for layer, cache_2BHTD in inner:
            x_BXE = _run_layer(layer, x_BXE, x_BXE, cache_2BHTD, start=start, bias=bias)
        # In the last layer the originals need keys and values only: no slot depends on their output.
        predicted = slice(num_originals * beams, None)
        layer, cache_2BHTD = last
        x_BXE = _run_layer(layer, x_BXE, x_BXE[:, predicted], cache_2BHTD, start=start, bias=bias[:, :, predicted])
        # The columns of the pseudo masks are dropped here; the next step overwrites their keys and values.
        self._columns = _Columns(
            columns.order_C[: -num_pseudo or None],
            columns.positions_BC[:, : -num_pseudo or None],
            columns.beam_BKC[..., : -num_pseudo or None],
        )
        logits = gather_logits(model.head(x_BXE, model.embeddings.token.weight))
        return logits[..., : model.config.vocab_size].unflatten(1, (num_pseudo, beams))

    def select(self, samples: Tensor) -> None:
        """Reduce the batch to the samples with these indices, in this order."""
        columns = self._columns
        self._context = select_samples(self._context, samples)
        self._columns = _Columns(columns.order_C, columns.positions_BC[samples], columns.beam_BKC[samples])
        self._caches = [cache_2BHTD.index_select(1, samples) for cache_2BHTD in self._caches]

    def _extended(self, appended: Appended, order_Q: Tensor) -> _Columns:
        """Columns for the queries of this step: those of the hypotheses that the beams extend, then their own."""
        previous, (batch, _, beams) = self._columns, appended.originals_BAK.shape
        beam_BKC, count = previous.beam_BKC, previous.order_C.numel()
        if count == 0:
            beam_BKC = beam_BKC.new_empty(batch, beams, 0)
        elif appended.parents_BK is not None:
            beam_BKC = beam_BKC.gather(1, appended.parents_BK[..., None].expand(-1, -1, count))
        own_BKQ = torch.arange(beams, device=order_Q.device)[None, :, None].expand(batch, -1, len(order_Q))
        return _Columns(
            torch.cat([previous.order_C, order_Q]),
            torch.cat([previous.positions_BC, appended.positions_BQ], dim=1),
            torch.cat([beam_BKC, own_BKQ], dim=2),
        )

    def _bias(self, appended: Appended, order_Q: Tensor, columns: _Columns) -> Tensor:
        """Bias of the scores of the queries X = Q * K for context and columns: [B, H | 1, X, S + C * K]."""
        beams, dtype = appended.originals_BAK.shape[2], self._model.embeddings.norm.weight.dtype
        visible_QC = visible(order_Q[:, None], columns.order_C[None])
        # A column is visible to a beam if the rule allows it and the beam J that holds it is the hypothesis' own.
        beam_J = torch.arange(beams, device=order_Q.device)
        is_own_BKCJ = columns.beam_BKC[..., None] == beam_J
        visible_BQKCJ = visible_QC[:, None, :, None] & is_own_BKCJ[:, None]
        to_columns = torch.zeros(visible_BQKCJ.shape, dtype=dtype, device=order_Q.device)
        to_columns = to_columns.masked_fill_(~visible_BQKCJ, float("-inf"))[:, None]
        valid_BS = self._context.valid_BS
        to_context = torch.zeros(valid_BS.shape, dtype=dtype, device=order_Q.device)
        to_context = to_context.masked_fill_(~valid_BS, float("-inf"))[:, None, None, None]
        if self._bias_HN is not None:
            # Positions do not depend on the beam: the bias is looked up for [Q, S + C] pairs and broadcast over beams.
            keys_BT = torch.cat([self._context.positions_BS, columns.positions_BC], dim=1)
            bias_BHQT = look_up(self._bias_HN, appended.positions_BQ, keys_BT).to(dtype).transpose(0, 1)
            to_context = to_context + bias_BHQT[:, :, :, None, : self._num_context]
            to_columns = to_columns + bias_BHQT[:, :, :, None, self._num_context :, None]
        to_context = to_context.expand(-1, -1, len(order_Q), beams, -1)
        return torch.cat([to_context, to_columns.flatten(4, 5)], dim=-1).flatten(2, 3)


def select_samples(state: T, samples: Tensor) -> T:
    """Return a dataclass of tensors [B, ...] for the samples with these indices."""
    tensors: Any = state
    return replace(tensors, **{field.name: getattr(state, field.name)[samples] for field in fields(tensors)})


@torch.no_grad()
def _encode(model: PseudoMaskedLM, context: Context, *, room: int) -> list[Tensor]:
    """Keys and values [2, B, H, S + room, D] of the context in each layer; the columns behind it are uninitialized."""
    inputs = SlotInputs(
        tokens_BT=context.tokens_BS,
        positions_BT=context.positions_BS,
        segments_BT=context.segments_BS,
        order_BT=torch.zeros_like(context.positions_BS),
        valid_BT=context.valid_BS,
    )
    slots = Slots(inputs, num_context=context.tokens_BS.shape[1])
    x_SBE = model.embeddings(context.tokens_BS.t(), context.positions_BS.t(), context.segments_BS.t())
    backend = attention_backend(model.config, x_SBE.device)
    groups = backend.plan(slots, model.relative_bias, x_SBE.dtype).inner
    caches = []
    for number, layer in enumerate(model.layers, start=1):
        assert isinstance(layer, Layer)
        attention = layer.attention
        kv_SBH2D = attention.key_value(x_SBE).unflatten(-1, (-1, 2, attention.head_dim))
        num_slots, batch, heads, _, width = kv_SBH2D.shape
        cache_2BHTD = x_SBE.new_empty(2, batch, heads, num_slots + room, width)
        cache_2BHTD[..., :num_slots, :] = kv_SBH2D.permute(3, 1, 2, 0, 4)
        caches.append(cache_2BHTD)
        if number < len(model.layers):  # no slot depends on the context's output of the last layer
            q_SBHD = attention.query(x_SBE).unflatten(-1, (-1, attention.head_dim))
            mixed_SBHD = backend.attend(q_SBHD, kv_SBH2D, groups, dropout=0.0)
            x_SBE, _ = layer.after_attention(x_SBE, mixed_SBHD.flatten(2))
    return caches


def _run_layer(
    layer: Layer, x_BXE: Tensor, queries_BYE: Tensor, cache_2BHTD: Tensor, *, start: int, bias: Tensor
) -> Tensor:
    """New states [B, Y, E] of the queries. Keys and values of the slots `x` [B, X, E] are cached at column `start`."""
    attention, end = layer.attention, start + x_BXE.shape[1]
    kv_BXH2D = attention.key_value(x_BXE).unflatten(-1, (-1, 2, attention.head_dim))
    cache_2BHTD[..., start:end, :] = kv_BXH2D.permute(3, 0, 2, 1, 4)
    q_BHYD = attention.query(queries_BYE).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    k_BHTD, v_BHTD = cache_2BHTD[..., :end, :]
    mixed_BHYD = F.scaled_dot_product_attention(q_BHYD, k_BHTD, v_BHTD, attn_mask=bias)
    return layer.after_attention(queries_BYE, mixed_BHYD.transpose(1, 2).flatten(2))[0]
