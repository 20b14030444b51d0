"""A run's numbers in the trackers that its user already looks at, by accelerate.

Our own history is the truth; a tracker is a window to it. TensorBoard where it is installed.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import flat
from .errors import ConfigError

# name of a tracker and of the package behind it
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio",
            "mlflow": "mlflow", "comet_ml": "comet_ml", "aim": "aim", "clearml": "clearml",
            "dvclive": "dvclive", "swanlab": "swanlab"}  # fmt: skip
_PROJECT = "new-llm"


def chosen_trackers(asked: str) -> tuple[str, ...]:
    """Return the trackers of an option: `auto`, `none`, or names with commas between.

    Raises:
        ConfigError: there is no such tracker, or its package is not installed.

    >>> chosen_trackers("none")
    ()
    >>> chosen_trackers("paper")
    Traceback (most recent call last):
    new_llm.errors.ConfigError: a tracker is auto, none, tensorboard, ... or swanlab; got 'paper'
    """
    if asked == "none":
        return ()
    if asked == "auto":
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    names = tuple(name.strip() for name in asked.split(","))
    for name in names:
        if name not in TRACKERS:
            *first, last = TRACKERS
            raise ConfigError(
                f"a tracker is auto, none, {', '.join(first)} or {last}; got {name!r}"
            )
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ConfigError(
                f"the package {TRACKERS[name]} expected for the tracker {name}, it is not "
                f"installed; pip install {TRACKERS[name]}, or --track none"
            )
    return names


class Tracking:
    """Hands the rows of a run's history to trackers; does nothing where there are none.

    Args:
        names: of `TRACKERS`.
        folder: where those that write files write them.
        config: of the run.

    >>> with Tracking((), Path("nowhere"), {}) as tracking:
    ...     tracking.log({"stage": "phase2", "step": 1, "loss": 2.0})
    """

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any]) -> None:
        self._names: list[Any] = list(names)
        self._folder, self._config = folder, dict(flat(config))
        self._accelerator: Any = None

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()

    def log(self, row: dict[str, Any]) -> None:
        """Hand over the numbers of a row of the history, named by its stage and block."""
        if not self._names:
            return
        if self._accelerator is None:
            # with the first row: a run that ends before it leaves nothing behind
            from accelerate import Accelerator

            self._accelerator = Accelerator(log_with=self._names, project_dir=str(self._folder))
            self._accelerator.init_trackers(_PROJECT, config=self._config)
        block = f"/block {row['block']}" if "block" in row else ""
        values = {
            f"{row['stage']}{block}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "block", "epoch")
        }
        self._accelerator.log(values, step=row.get("step"))
