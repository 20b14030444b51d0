"""What a training looks at while it runs: numbers that must be finite, and signs of trouble."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import World, own_part
from .errors import NonFiniteError

# losses between two of which a jump is looked for, and the share of the new in their mean
_BEFORE, _SHARE = 50, 0.05
# how many mean deviations, and nats, above their mean a loss is a spike
_DEVIATIONS, _NATS = 6.0, 0.5
# steps in which one kind of warning is given once
_QUIET = 200


def require_finite(
    numbers: Mapping[str, float],
    tensors: Mapping[str, Tensor | None],
    place: str,
    world: World | None = None,
) -> None:
    """Check numbers of a step; where one is not finite, name the first tensor that is not.

    Args:
        numbers: what decides, the same on all processes.
        tensors: where it may come from, in the order of computing.
        place: the step, in words.
        world: processes that check together; the first tensor is that of any of them.

    Raises:
        NonFiniteError: a number is NaN or infinite; the same on all processes, said by one.

    >>> require_finite({"the loss": 1.0}, {}, "step 3")
    >>> require_finite({"the loss": math.nan}, {"W": torch.tensor([1.0, math.inf])}, "step 3")
    Traceback (most recent call last):
    new_llm.errors.NonFiniteError: the loss must stay finite, got nan in step 3 (W: 1 of 2 ...
    """
    for name, value in numbers.items():
        if math.isfinite(value):
            continue
        world = world or World()
        named = first_bad(tensors, world)
        error = NonFiniteError(f"{name} must stay finite, got {value} in {place}{named}")
        error.said = not world.is_main
        raise error


def first_bad(tensors: Mapping[str, Tensor | None], world: World | None = None) -> str:
    """Return in words, in brackets, the first tensor that is not finite; nothing if all are.

    Of several processes, which must all ask for the same names, that of the one that has the first.

    >>> first_bad({"W": torch.ones(2), "b": torch.tensor([math.nan])})
    ' (b: 1 of 1 numbers are not finite)'
    """
    texts = map(_bad, tensors, tensors.values())
    found = next(((place, text) for place, text in enumerate(texts) if text), None)
    place, text = found or (len(tensors), "")
    text = text if world is None else world.earliest(place, text)
    return f" ({text})" if text else ""


def _bad(name: str, tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    # of a divided one the part that is here
    bad = ~torch.isfinite(own_part(tensor))
    count = int(bad.sum())
    return f"{name}: {count:,} of {bad.numel():,} numbers are not finite" if count else None


class Watch:
    """Looks at the numbers of a training and says once what may go wrong, and what to try.

    >>> watch = Watch()
    >>> [len(watch.loss(step, 3.0 + 0.01 * (step % 2))) for step in range(100)] == [0] * 100
    True
    >>> watch.loss(100, 9.0)[0]
    'the loss jumped from 3.01 to 9.00 in step 100; if it does not come back, ...'
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.deviation = 0.0
        self.seen = 0
        self._said: dict[str, int] = {}

    def loss(self, step: int, loss: float) -> list[str]:
        """Look at the loss of a step."""
        found = []
        if self.mean is None:
            self.mean = loss
        above = loss - self.mean
        if self.seen >= _BEFORE and above > max(_NATS, _DEVIATIONS * self.deviation):
            found = self._say(
                step,
                "spike",
                f"the loss jumped from {self.mean:.2f} to {loss:.2f} in step {step}; if it does "
                "not come back, lower --phase2.learning-rate or --phase2.gradient-clip",
            )
        else:
            # a spike is not what later losses are compared with
            self.mean += _SHARE * above
            self.deviation += _SHARE * (abs(above) - self.deviation)
        self.seen += 1
        return found

    def coupling(self, step: int, block: int, q2: float, limit: float) -> list[str]:
        """Look at the coupling of a block's cell, in full decomposition."""
        if limit == 0.0 or q2 <= 1.01 * limit:
            return []
        return self._say(
            step,
            f"coupling {block}",
            f"the coupling q2 of block {block} is {q2:.3f} in step {step}, its limit is {limit:g}: "
            "contraction is not proved; lower --phase2.learning-rate or --model.coupling-limit",
        )

    def sweeps(self, step: int, block: int, num_sweeps: int, most: int) -> list[str]:
        """Look at how many sweeps gate-scan takes."""
        if num_sweeps <= most:
            return []
        return self._say(
            step,
            f"sweeps {block}",
            f"gate-scan of block {block} takes {num_sweeps} sweeps in step {step}, {most} are "
            "healthy; lower --model.coupling-limit, or train with --phase2.engine scan",
        )

    def _say(self, step: int, kind: str, text: str) -> list[str]:
        said = self._said.get(kind)
        if said is not None and step - said < _QUIET:
            return []
        self._said[kind] = step
        return [text]

    def values(self) -> list[Any]:
        """Return plain values that a state holds."""
        return [self.mean, self.deviation, self.seen, self._said]

    def restore(self, values: list[Any]) -> None:
        """Go on from what `values` returned."""
        self.mean, self.deviation, self.seen, self._said = values
