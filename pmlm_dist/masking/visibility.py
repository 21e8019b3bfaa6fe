"""Visibility: which slot sees which, from one signed integer per slot.

`order` is 0 for context (unmasked tokens and [M] slots), +k for the originals of step k and -k for the pseudo masks of
step k (`masking/layout.py`):

    query \\ key     context    original of step j    pseudo mask of step j
    context         yes        no                    no
    original k      yes        j <= k                no
    pseudo mask k   yes        j < k                 j = k

Hence the context never depends on appended slots, originals never see a pseudo mask, and a pseudo mask sees the truth
of earlier steps only. Fine-tuning and decoding use the same rule: source = order 0, target token t = step t.
The functions use operators only, so that they work on NumPy arrays, torch tensors and inside compiled kernels alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def visible(q_order: Array, k_order: Array) -> Array:
    """Whether a query of order `q_order` sees a key of order `k_order` (both broadcastable integers); bool."""
    text_key = k_order >= 0
    seen_by_text = (q_order >= 0) & text_key & (k_order <= q_order)
    seen_by_pseudo = (q_order < 0) & ((text_key & (k_order < -q_order)) | (k_order == q_order))
    seen: Any = seen_by_text | seen_by_pseudo
    return seen


def visibility_matrix(order: Array, valid: Array | None = None) -> Array:
    """Who sees whom: [..., T, T] (query, key), bool, from `order` [..., T].

    Keys that are not `valid` ([..., T], bool: padding and unused slots) are seen by nobody. Queries that are not valid
    keep order 0 and see the context, so that no softmax row is empty.
    """
    seen = visible(order[..., :, None], order[..., None, :])
    return seen if valid is None else seen & valid[..., None, :]
