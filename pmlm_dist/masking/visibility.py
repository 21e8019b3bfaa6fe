"""Visibility: which slot attends to which, as a function of one signed integer per slot.

`order` is 0 for context (unmasked tokens and [M] slots), +k for the originals of step k and -k for the pseudo masks of
step k (`masking/layout.py`):

    query \\ key     context    original of step j    pseudo mask of step j
    context         yes        no                    no
    original k      yes        j <= k                no
    pseudo mask k   yes        j < k                 j = k

Hence the context never depends on appended slots, originals never attend to a pseudo mask, and a pseudo mask attends to
the originals of earlier steps only. Fine-tuning and decoding use the same rule: source = order 0, target token t =
step t. The functions use operators only, so that they accept NumPy arrays and torch tensors.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")


def visible(q_order: Array, k_order: Array) -> Array:
    """True where a query of order `q_order` attends to a key of order `k_order` (both broadcastable integers)."""
    is_text_key = k_order >= 0
    from_text = (q_order >= 0) & is_text_key & (k_order <= q_order)
    from_pseudo = (q_order < 0) & ((is_text_key & (k_order < -q_order)) | (k_order == q_order))
    result: Any = from_text | from_pseudo
    return result


def visibility_matrix(order: Array, valid: Array | None = None) -> Array:
    """Visibility of all pairs: [..., T, T] (query, key), bool, from `order` [..., T].

    Keys that are not `valid` ([..., T], bool: padding and unused slots) are visible to no query. Queries that are not
    valid have order 0 and attend to the context, so that no softmax row is empty.
    """
    result = visible(order[..., :, None], order[..., None, :])
    return result if valid is None else result & valid[..., None, :]
