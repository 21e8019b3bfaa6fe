"""Hash-based pseudo-random numbers: functions of their arguments, so the result is the same on any number of ranks."""

import numpy as np

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# First argument of a hash: its purpose. Equal seeds and units then give independent numbers.
FOR_SPLIT, FOR_VOCABULARY, FOR_PACKING, FOR_ORDER, FOR_DIGEST = range(5)


def hash64(*numbers: int) -> int:
    """Return a pseudo-random number in 0 .. 2**64 - 1 from `numbers`: splitmix64 (Steele et al. 2014), chained."""
    state = 0
    for number in numbers:
        state = (state + (number & _WORD) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def hash64_each(*numbers: int, last: np.ndarray) -> np.ndarray:
    """Return `hash64(*numbers, n)` for every n of `last`, shape [N], uint64."""
    return extend_hash64(np.uint64(hash64(*numbers)), last)


def extend_hash64(prefix: np.ndarray | np.uint64, last: np.ndarray) -> np.ndarray:
    """Return `hash64(*numbers, n)` for every n of `last` [N], with `prefix` = `hash64(*numbers)`: scalar or [N]."""
    state = prefix + last.astype(np.uint64) + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
