"""Arrays on disk."""

import io
from pathlib import Path

import numpy as np

from pmlm_dist.files import write_atomically


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file atomically. The OSError of a full disk has its number: that of `numpy.save` has none."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue(), durable=False)
