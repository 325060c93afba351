"""Which windows an update reads: computed from (config, step), never stored.

Window i of a split is tokens [i*T, i*T + T + 1): T inputs and the T targets one further on. Update
k of an epoch takes windows order[(k-1)*G : k*G], where G = tokens_per_update / T. The orders are

    sequential          the windows as they lie in the shards
    shuffle_documents   the same, of a stream in which the shards, and the documents in each, have
                        changed places (documents.py); the places are drawn anew every epoch
    shuffle_windows     one permutation of all windows, drawn anew every epoch

Nothing here grows with the data. Fifteen trillion tokens are 1.5e10 windows of 1,024; the
permutation's network works on numbers below its square root, 1.2e5, and the products that leave it
stay just above their count, so 64 bits suffice up to 9e18 windows (`_mix` overflows on purpose).
Shards of ten billion tokens would keep their number at 1,500 and the manifest below half a
megabyte. The index of documents.py takes eight bytes a document, 120 GB for 1.5e10 of them; a
process reads one shard's part, 80 MB, but it would have to be written as one file a shard. Shards
stay uint16 as long as the vocabulary has at most 65,536 ids, and the validation tokens stay those
they are.
"""

import math

import numpy as np

from config import Config, windows_per_update


def epoch_and_update(config: Config, step: int, windows: int) -> tuple[int, int]:
    """Return the epoch of update `step` (1 is the first) and its number in it, both from 0 on.

    `windows` is their number in an epoch; its last ones, which do not fill an update, are left out.
    """
    return divmod(step - 1, windows // windows_per_update(config))


def update_windows(config: Config, step: int, windows: int) -> np.ndarray:
    """Return the G windows of update `step`, int64, of `windows` in an epoch.

    For shuffle_documents they are windows of the epoch's re-ordered stream.
    """
    size = windows_per_update(config)
    epoch, update = epoch_and_update(config, step, windows)
    positions = np.arange(update * size, (update + 1) * size)
    if config.train.order == "shuffle_windows":
        return permute(positions, windows, config.train.seed, epoch)
    return positions


def permute(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return where `positions` go in a pseudo-random permutation of range(count), int64.

    The permutation is computed, not stored: a Feistel network over pairs (left, right) with
    left < a, right < b and a * b just above `count` (Black and Rogaway 2002); the few positions
    that land past the end walk on until they land inside. So any update of ten trillion tokens is
    found at once, without memory, and alike on every machine and NumPy version.
    """
    # The square root, rounded up.
    a = math.isqrt(max(count - 1, 0)) + 1
    b = -(-count // a)
    places = np.array(positions, dtype=np.uint64)
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        places[outside] = _feistel(places[outside], a, b, seed, epoch)
        outside = places >= count
    return places.astype(np.int64)


def subseed(seed: int, number: int) -> int:
    """Return a seed of its own for thing `number` of those that are drawn from `seed`."""
    return int(_mix(_mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(number))[0])


def _feistel(places: np.ndarray, a: int, b: int, seed: int, epoch: int) -> np.ndarray:
    left, right = places // np.uint64(b), places % np.uint64(b)
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    # Four rounds make a good permutation (Luby and Rackoff 1988); eight leave no doubt.
    for _ in range(4):
        key = _mix(key)
        left = (left + _mix(right ^ key) % np.uint64(a)) % np.uint64(a)
        key = _mix(key)
        right = (right + _mix(left ^ key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values so that each output bit depends on every input bit (SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
