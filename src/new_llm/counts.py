"""Count models: what a table of n-grams predicts, the strongest peer of small corpora.

Axes: `N` predicted tokens, all but the first of each dialogue.
"""

from collections.abc import Sequence

import numpy as np

from .data import TokenStore

# discounts of counts of 1, 2, and 3 and more
Discounts = tuple[float, float, float]
# where counts of counts are too few to estimate from; the same as KenLM's
_FALLBACK: Discounts = (0.5, 1.0, 1.5)


class KneserNey:
    """Interpolated modified Kneser-Ney n-grams, down to the uniform distribution.

    The highest order counts how often an n-gram occurs, each lower one how many different tokens
    stand before it. Every order has three discounts, estimated from its counts of counts.
    Dialogues are counted and scored apart; what would stand before one is a mark of its own.

    Args:
        train: the dialogues that are counted.
        vocab_size: token ids are below it.
        order: tokens of an n-gram; 2 is a bigram.
        discounts: of each order from 1 up; None estimates them.

    Source: Chen and Goodman 1998, "An empirical study of smoothing techniques".

    >>> from new_llm.data import TokenStore
    >>> ids = np.array([0, 1, 0, 1, 0, 2], dtype=np.int32)
    >>> store = TokenStore(tokens=ids, assistant=ids > 0, offsets=np.array([0, 6]),
    ...                    num_content_bytes=np.array([6]), fingerprint="")
    >>> KneserNey(store, 3, 2).nats(store).shape
    (5,)
    """

    def __init__(
        self,
        train: TokenStore,
        vocab_size: int,
        order: int,
        discounts: Sequence[Discounts] | None = None,
    ) -> None:
        if order < 1 or (vocab_size + 1) ** order >= 2**63:
            raise ValueError(f"n-grams of {order} tokens of {vocab_size} ids do not fit in 63 bits")
        self.vocab_size, self.order = vocab_size, order
        grams, counts = np.unique(_grams(train, vocab_size, order), return_counts=True)
        levels = []
        for n in range(order, 0, -1):
            given = None if discounts is None else discounts[n - 1]
            levels.append(_Level(grams, counts, vocab_size + 1, given))
            # distinct n-grams that end in the same n - 1 tokens
            grams, counts = np.unique(grams % (vocab_size + 1) ** (n - 1), return_counts=True)
        self._levels = levels[::-1]

    def nats(self, store: TokenStore) -> np.ndarray:
        """Return the negative log-likelihood of each predicted token, `[N]`, in order."""
        asked = _grams(store, self.vocab_size, self.order)
        share = np.full(len(asked), 1.0 / self.vocab_size)
        for n, level in enumerate(self._levels, start=1):
            share = level.mix(asked % (self.vocab_size + 1) ** n, share)
        return -np.log(share)

    def loss(self, store: TokenStore) -> float:
        """Return the mean of `nats`."""
        return float(self.nats(store).mean())


class _Level:
    """The n-grams of one order; the last token is the lowest digit."""

    def __init__(
        self, grams: np.ndarray, counts: np.ndarray, base: int, discounts: Discounts | None
    ) -> None:
        self.grams, self.base = grams, base
        table = np.array([0.0, *(_discounts(counts) if discounts is None else discounts)])
        discount = table[np.minimum(counts, 3)]
        self.kept = counts - discount
        # grams are sorted, so those of one context stand together
        self.contexts, first = np.unique(grams // base, return_index=True)
        self.totals = np.add.reduceat(counts, first).astype(np.float64)
        self.left_over = np.add.reduceat(discount, first)

    def mix(self, asked: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return the shares of this order: `lower` where its context was never seen."""
        place, seen = _find(self.grams, asked)
        context, known = _find(self.contexts, asked // self.base)
        direct = np.where(seen, self.kept[place], 0.0)
        mixed = (direct + self.left_over[context] * lower) / self.totals[context]
        return np.where(known, mixed, lower)


def _discounts(counts: np.ndarray) -> Discounts:
    once, twice, thrice, four = (max(int((counts == n).sum()), 1) for n in range(1, 5))
    share = once / (once + 2 * twice)
    found = [
        n - (n + 1) * share * ratio
        for n, ratio in enumerate((twice / once, thrice / twice, four / thrice), start=1)
    ]
    if any(not 0.0 < discount <= n for n, discount in enumerate(found, start=1)):
        return _FALLBACK
    return found[0], found[1], found[2]


def _find(ordered: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where values stand in a sorted array, and whether they do."""
    place = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
    return place, ordered[place] == asked


def _grams(store: TokenStore, vocab_size: int, order: int) -> np.ndarray:
    """Return the n-gram that ends in each predicted token, as one number, `[N]`."""
    tokens = np.asarray(store.tokens, dtype=np.int64)
    age = np.arange(len(tokens)) - np.repeat(store.offsets[:-1], np.diff(store.offsets))
    predicted = np.flatnonzero(age)
    code = tokens[predicted]
    for k in range(1, order):
        before = np.where(age[predicted] >= k, tokens[predicted - k], vocab_size)
        code = code + before * (vocab_size + 1) ** k
    return code
