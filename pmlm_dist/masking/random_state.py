"""Counter-based random numbers for masks, as compiled functions.

    (seed, epoch, item) --seed_state--> state, one uint64 --uniform | below--> numbers

The generator is splitmix64 (Steele, Lea and Flood, 2014): a counter run through a mixer. Its state is one number and
seeding costs three mixes, so that every sample can have a generator of its own. The numbers are the same under every
version of NumPy and numba, whereas the streams of NumPy's generators may change between releases.
"""

from typing import Any

import numpy as np

from pmlm_dist.masking.machine_code import compiled

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


@compiled
def _mix(bits: Any) -> Any:
    """splitmix64's finalizer: a bijection of uint64 in which every input bit affects every output bit."""
    # numba promotes uint64 and int64 together to float64, hence the wrapped constants.
    bits = (bits ^ (bits >> np.uint64(30))) * _MULTIPLIER_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MULTIPLIER_2
    return bits ^ (bits >> np.uint64(31))


@compiled
def seed_state(seed: int, epoch: int, item: int) -> Any:
    """Generator state (uint64) of an item in an epoch; all three must be at least 0."""
    # One mix for each number: a plain sum would give (epoch, item + 1) and (epoch + 1, item) the same stream.
    state = _mix(np.uint64(seed) + _GAMMA)
    state = _mix((state ^ np.uint64(epoch)) + _GAMMA)
    return _mix((state ^ np.uint64(item)) + _GAMMA)


@compiled
def _next_bits(state: np.ndarray) -> Any:
    state[0] += _GAMMA
    return _mix(state[0])


@compiled
def uniform(state: np.ndarray) -> float:
    """Next number in [0, 1); `state` is uint64 [1] and is advanced in place."""
    # The high 53 bits: a double holds no more, and rounding 64 of them could give 1.0.
    return np.float64(_next_bits(state) >> np.uint64(11)) * 2.0**-53


@compiled
def below(state: np.ndarray, bound: int) -> Any:
    """Next integer in 0 .. bound-1, for bound < 2^32; `state` is uint64 [1] and is advanced in place."""
    # Multiply-shift (Lemire, 2019) instead of a remainder: no division, and a bias below bound / 2^32.
    return np.int64(((_next_bits(state) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))
