"""Incremental forward pass: the context is computed once, then each step adds what was decided and asks for more.

    open     context (order 0) --> keys and values of every layer, one copy a sample
    step k   originals of step k - 1 | pseudo masks of step k  --> logits at the pseudo masks
             (keys and values kept)    (seen in this step only)

It is the network that is trained, under the rule it is trained with (`masking/visibility.py`): the context has order 0,
originals of step k order +k, pseudo masks of step k order -k. Text that is written from left to right has one position
a step; infilling has any positions in any order.

Beams are hypotheses of one sample that share its context. What a step adds is written once, into the columns of its
beam, and never moved: a hypothesis is the list of the beams in which its columns lie (`_Columns.home_BKC`), so that a
new order of beams changes small integers and no key or value:

    keys of a sample    [ context S | step 1: beams 0..K-1 | step 2: beams 0..K-1 | ... | pseudo masks of this step ]
    seen by a beam        all         its own ancestor       its own ancestor             its own

All beams of a sample ask in one product over these keys; those of other hypotheses are left out by minus infinity.

Legend: B samples, K beams, S context slots, A originals and P pseudo masks of a step, Q = A + P, C columns, H heads of
this rank, D head size, E hidden size, N distances, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from pmlm_dist.masking.layout import SlotInputs
from pmlm_dist.masking.visibility import visible
from pmlm_dist.model.attention import ATTENTION_BACKENDS, Slots
from pmlm_dist.model.relative_position import look_up
from pmlm_dist.model.transformer import Layer, PseudoMaskedLM
from pmlm_dist.parallel.cross_entropy import gather_logits


@dataclass(frozen=True)
class Context:
    """What is there before the first step; padding may stand on either side.

    `positions_BS` must count up by one within the valid slots of a sample.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor
    valid_BS: Tensor


@dataclass(frozen=True)
class Appended:
    """What a step feeds: tokens of the A originals of the step before, places of these and of the P pseudo masks.

    `positions_BQ` and `segments_BQ` are shared by the beams, originals first. `parents_BK` names the beam of the step
    before that each beam goes on from (None: itself).
    """

    originals_BAK: Tensor
    positions_BQ: Tensor
    segments_BQ: Tensor
    parents_BK: Tensor | None = None


@dataclass
class _Columns:
    """The originals fed so far, C columns of K beams each."""

    order_C: Tensor
    positions_BC: Tensor
    home_BKC: Tensor
    """The beam in which a hypothesis' column lies."""


class DecodingSession:
    """The state of decoding a batch; `step` advances it. The model is in evaluation mode and is not changed."""

    def __init__(self, model: PseudoMaskedLM, context: Context, *, mask_id: int, beams: int, capacity: int):
        """Compute the context's keys and values, with room for `capacity` slots a beam.

        At most that many originals and pseudo masks (those of the last step) may stand there at a time.
        """
        assert not model.training, "decoding needs evaluation mode: dropout would make it random"
        self._model, self._mask_id = model, mask_id
        self._layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        self._context, self._step = context, 0
        batch, self._num_context = context.tokens_BS.shape
        nothing = context.positions_BS.new_empty(batch, 0)
        self._columns = _Columns(nothing[0], nothing, nothing[:, None])
        self._bias_HN = None
        if model.relative_bias is not None:
            self._bias_HN = model.relative_bias.by_distance(model.relative_bias.max_distance).detach()
        self._caches = _encode(model, context, room=capacity * beams)

    @torch.no_grad()
    def step(self, appended: Appended) -> Tensor:
        """Logits [B, P, K, V] over the whole vocabulary, equal on tensor-parallel peers; rows that pad it left out.

        The first step may be asked with a single beam, since all are equal then.
        """
        originals_BAK, model = appended.originals_BAK, self._model
        batch, kept, beams = originals_BAK.shape
        num_pseudo = appended.positions_BQ.shape[1] - kept
        self._step += 1
        order_Q = torch.tensor([self._step - 1] * kept + [-self._step] * num_pseudo, device=originals_BAK.device)
        columns = self._with(appended, order_Q)
        bias = self._bias(appended, order_Q, columns)
        pseudo_BPK = originals_BAK.new_full((batch, num_pseudo, beams), self._mask_id)
        tokens_BQK = torch.cat([originals_BAK, pseudo_BPK], dim=1)
        x_BQKE = model.embeddings(tokens_BQK, appended.positions_BQ[..., None], appended.segments_BQ[..., None])
        start = self._num_context + self._columns.order_C.numel() * beams
        x_BXE = x_BQKE.flatten(1, 2)
        *inner, last = zip(self._layers, self._caches, strict=True)
        for layer, cache_2BHTD in inner:
            x_BXE = _layer(layer, x_BXE, x_BXE, cache_2BHTD, start=start, bias=bias)
        asking = slice(kept * beams, None)  # nobody reads the originals' last states
        layer, cache_2BHTD = last
        x_BXE = _layer(layer, x_BXE, x_BXE[:, asking], cache_2BHTD, start=start, bias=bias[:, :, asking])
        self._columns = _Columns(
            columns.order_C[: -num_pseudo or None],
            columns.positions_BC[:, : -num_pseudo or None],
            columns.home_BKC[..., : -num_pseudo or None],
        )
        logits = gather_logits(model.head(x_BXE, model.embeddings.token.weight))
        return logits[..., : model.config.vocab_size].unflatten(1, (num_pseudo, beams))

    def keep(self, samples: Tensor) -> None:
        """Go on with these samples alone (their indices), in this order."""
        context, columns = self._context, self._columns
        self._context = Context(*(getattr(context, field.name)[samples] for field in fields(context)))
        self._columns = _Columns(columns.order_C, columns.positions_BC[samples], columns.home_BKC[samples])
        self._caches = [cache_2BHTD.index_select(1, samples) for cache_2BHTD in self._caches]

    def _with(self, appended: Appended, order_Q: Tensor) -> _Columns:
        """The columns as the queries of this step find them: those before, as their hypotheses go on, and their own."""
        before, (batch, _, beams) = self._columns, appended.originals_BAK.shape
        home_BKC, count = before.home_BKC, before.order_C.numel()
        if count == 0:
            home_BKC = home_BKC.new_empty(batch, beams, 0)
        elif appended.parents_BK is not None:
            home_BKC = home_BKC.gather(1, appended.parents_BK[..., None].expand(-1, -1, count))
        own_BKQ = torch.arange(beams, device=order_Q.device)[None, :, None].expand(batch, -1, len(order_Q))
        return _Columns(
            torch.cat([before.order_C, order_Q]),
            torch.cat([before.positions_BC, appended.positions_BQ], dim=1),
            torch.cat([home_BKC, own_BKQ], dim=2),
        )

    def _bias(self, appended: Appended, order_Q: Tensor, columns: _Columns) -> Tensor:
        """Added to the scores of the queries X = Q * K towards context and columns: [B, H | 1, X, S + C * K]."""
        beams, dtype = appended.originals_BAK.shape[2], self._model.embeddings.norm.weight.dtype
        seen_QC = visible(order_Q[:, None], columns.order_C[None])
        beam_J = torch.arange(beams, device=order_Q.device)
        own_BKCJ = columns.home_BKC[..., None] == beam_J
        seen_BQKCJ = seen_QC[:, None, :, None] & own_BKCJ[:, None]
        to_columns = torch.zeros(seen_BQKCJ.shape, dtype=dtype, device=order_Q.device)
        to_columns = to_columns.masked_fill_(~seen_BQKCJ, float("-inf"))[:, None]
        valid_BS = self._context.valid_BS
        to_context = torch.zeros(valid_BS.shape, dtype=dtype, device=order_Q.device)
        to_context = to_context.masked_fill_(~valid_BS, float("-inf"))[:, None, None, None]
        if self._bias_HN is not None:
            keys_BT = torch.cat([self._context.positions_BS, columns.positions_BC], dim=1)
            bias_BHQT = look_up(self._bias_HN, appended.positions_BQ, keys_BT).to(dtype).transpose(0, 1)
            to_context = to_context + bias_BHQT[:, :, :, None, : self._num_context]
            to_columns = to_columns + bias_BHQT[:, :, :, None, self._num_context :, None]
        to_context = to_context.expand(-1, -1, len(order_Q), beams, -1)
        return torch.cat([to_context, to_columns.flatten(4, 5)], dim=-1).flatten(2, 3)


@torch.no_grad()
def _encode(model: PseudoMaskedLM, context: Context, *, room: int) -> list[Tensor]:
    """Keys and values [2, B, H, S + room, D] of the context in each layer; what follows the context is not set."""
    inputs = SlotInputs(
        tokens_BT=context.tokens_BS,
        positions_BT=context.positions_BS,
        segments_BT=context.segments_BS,
        order_BT=torch.zeros_like(context.positions_BS),
        valid_BT=context.valid_BS,
    )
    slots = Slots(inputs, num_context=context.tokens_BS.shape[1])
    x_SBE = model.embeddings(context.tokens_BS.t(), context.positions_BS.t(), context.segments_BS.t())
    groups = ATTENTION_BACKENDS[model.config.attention].plan(slots, model.relative_bias, x_SBE.dtype).inner
    caches = []
    for number, layer in enumerate(model.layers, start=1):
        assert isinstance(layer, Layer)
        attention = layer.attention
        kv_SBH2D = attention.key_value(x_SBE).unflatten(-1, (-1, 2, attention.head_dim))
        num_slots, batch, heads, _, width = kv_SBH2D.shape
        cache_2BHTD = x_SBE.new_empty(2, batch, heads, num_slots + room, width)
        cache_2BHTD[..., :num_slots, :] = kv_SBH2D.permute(3, 1, 2, 0, 4)
        caches.append(cache_2BHTD)
        if number < len(model.layers):  # the last layer's states of the context are read by nobody
            q_SBHD = attention.query(x_SBE).unflatten(-1, (-1, attention.head_dim))
            mixed_SBHD = attention.attend(q_SBHD, kv_SBH2D, groups, dropout=0.0)
            x_SBE = layer.after_attention(x_SBE, attention.output(mixed_SBHD.flatten(2)))
    return caches


def _layer(
    layer: Layer, x_BXE: Tensor, queries_BYE: Tensor, cache_2BHTD: Tensor, *, start: int, bias: Tensor
) -> Tensor:
    """New states [B, Y, E] of the queries; keys and values of the slots `x` [B, X, E] are cached from `start` on."""
    attention, end = layer.attention, start + x_BXE.shape[1]
    kv_BXH2D = attention.key_value(x_BXE).unflatten(-1, (-1, 2, attention.head_dim))
    cache_2BHTD[..., start:end, :] = kv_BXH2D.permute(3, 0, 2, 1, 4)
    q_BHYD = attention.query(queries_BYE).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    k_BHTD, v_BHTD = cache_2BHTD[..., :end, :]
    mixed_BHYD = F.scaled_dot_product_attention(q_BHYD, k_BHTD, v_BHTD, attn_mask=bias)
    return layer.after_attention(queries_BYE, attention.output(mixed_BHYD.transpose(1, 2).flatten(2)))
