import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.lm import KneserNeyInterpolated
from nltk.lm.vocabulary import Vocabulary

from helpers import store_of
from new_llm.counts import KneserNey

V = 12


def some_dialogues(count: int, seed: int = 0) -> list[list[int]]:
    """Return texts in which some tokens often follow others."""
    generator = np.random.default_rng(seed)
    follows = generator.integers(V, size=(V, 3))
    texts = []
    for _ in range(count):
        ids = [int(generator.integers(V))]
        for _ in range(int(generator.integers(1, 25))):
            free = generator.random() < 0.2
            ids.append(int(generator.integers(V) if free else generator.choice(follows[ids[-1]])))
        texts.append(ids)
    return texts


def grams(ids: list[int], order: int) -> Iterator[tuple[str, ...]]:
    """Yield every n-gram that ends in a token after the first, as the library reads them."""
    padded = ["<s>"] * (order - 1) + [str(i) for i in ids]
    for end in range(order, len(padded)):
        for n in range(1, order + 1):
            yield tuple(padded[end - n + 1 : end + 1])


@pytest.mark.parametrize("order", [2, 3])
def test_the_same_as_nltk_with_one_discount(order: int) -> None:
    train, held_out = some_dialogues(40), some_dialogues(20, seed=1)
    library = KneserNeyInterpolated(
        order, discount=0.3, vocabulary=Vocabulary([str(i) for i in range(V)])
    )
    library.fit([list(grams(ids, order)) for ids in train])
    # it ends at the continuation shares of single tokens
    discounts = [(0.0, 0.0, 0.0)] + [(0.3, 0.3, 0.3)] * (order - 1)
    found = KneserNey(store_of(train), V, order, discounts).nats(store_of(held_out))
    expected = []
    for ids in held_out:
        padded = ["<s>"] * (order - 1) + [str(i) for i in ids]
        for end in range(order, len(padded)):
            share = library.score(padded[end], padded[end - order + 1 : end])
            expected.append(-math.log(share))
    assert found == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20)
@given(order=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_context_has_a_distribution(order: int, seed: int) -> None:
    model = KneserNey(store_of(some_dialogues(12, seed)), V + 2, order)
    # a context that was seen, one that was not, and the ids V and V + 1, which never were
    for before in ([3, 1, 4], [V, V + 1, V], [0]):
        store = store_of([[*before, after] for after in range(V + 2)])
        last = model.nats(store).reshape(V + 2, len(before))[:, -1]
        assert np.exp(-last).sum() == pytest.approx(1.0, abs=1e-9)


def test_longer_contexts_help_where_they_say_more() -> None:
    # the next token is decided by the two before
    generator = np.random.default_rng(0)
    follows = generator.integers(V, size=(V, V))
    texts = []
    for _ in range(80):
        ids = [0, int(generator.integers(V))]
        for _ in range(30):
            ids.append(int(follows[ids[-2], ids[-1]]) if generator.random() < 0.9 else 1)
        texts.append(ids)
    train, held_out = store_of(texts[:60]), store_of(texts[60:])
    losses = [KneserNey(train, V, order).loss(held_out) for order in (1, 2, 3)]
    assert losses[2] < losses[1] - 0.3 < losses[0] - 0.3


def test_too_many_tokens_for_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey(store_of([[1, 2]]), 50_000, 5)
