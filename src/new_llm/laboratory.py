"""The laboratory: real dialogues for its experiments, and a runner for their trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import __version__
from .config import PRESETS, to_dict
from .console import Console
from .dialogues import Messages, ReadReport, read_dialogues
from .errors import DataError
from .runner import Numbers, Runner
from .tokenizer import ChatTokenizer
from .trials import SEED_RULE

CELLS = ("sequential", "layerwise")
TEXT_LENGTH = 512
TEXT_DIALOGUES = 10
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Text:
    """Real dialogues in GPT-2's vocabulary, the first 512 tokens of each."""

    source: str
    train: list[list[int]]
    """Ten dialogues that are trained on."""
    held_out: list[list[int]]
    """Ten others."""


class Laboratory:
    """Runs trials and remembers them, with real dialogues at hand.

    Args:
        console: for progress.
        data: dialogues, in any form that `run` takes; None is the default package.
        out: folder that keeps what is finished; it is not computed again.
        num_workers: processes; 1 computes in this one. None takes a process a core.
    """

    def __init__(
        self,
        *,
        console: Console,
        data: str | None = None,
        out: Path | None = None,
        num_workers: int | None = None,
    ) -> None:
        self.source = "chitchat-dataset" if data is None else data
        # no trial trains Phase 2
        configs = [
            to_dict(part)
            for config in (make() for make in PRESETS.values())
            for part in (config.model, config.solver, config.phase1)
        ]
        self.console = console
        self.runner = Runner(
            console=console,
            folder=None if out is None else out / "trials",
            basis=[__version__, configs, SEED_RULE],
            num_workers=num_workers,
        )

    def __enter__(self) -> "Laboratory":
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.__exit__(*error)

    @cached_property
    def text(self) -> Text:
        """The dialogues of the experiments on real text."""
        report = ReadReport()
        text = read_text(self.source, report)
        if report.left_out is not None:
            self.console.show(report.left_out)
        return text

    def run(
        self,
        title: str,
        trial: Callable[..., Numbers],
        arguments: Sequence[dict[str, Any]],
        cost: Callable[[dict[str, Any]], float] = lambda given: 1.0,
    ) -> list[Numbers]:
        """Return what a trial gives for each of many arguments, as `Runner.run` does."""
        return self.runner.run(title, trial, arguments, cost)


def read_text(source: str, report: ReadReport) -> Text:
    """Read the first dialogues of a source that are long enough, half of them held out.

    `report` takes count of rows that are no dialogues, which are left out.

    Raises:
        DataError: the source cannot be read, or too few dialogues are long enough.
    """
    tokenizer = ChatTokenizer.gpt2()
    rows = read_dialogues(
        source, split="train_sft", on_bad_row="skip", max_dialogues=None, report=report
    )
    found: list[list[int]] = []
    batch: list[Messages] = []

    def take() -> None:
        encoded = (ids.tolist() for ids, _ in tokenizer.encode_dialogues(batch))
        found.extend(ids[:TEXT_LENGTH] for ids in encoded if len(ids) >= TEXT_LENGTH)
        batch.clear()

    for messages in rows:
        batch.append(messages)
        if len(batch) == _BATCH:
            take()
        if len(found) >= 2 * TEXT_DIALOGUES:
            break
    if batch:
        take()
    if len(found) < 2 * TEXT_DIALOGUES:
        raise DataError(
            f"{2 * TEXT_DIALOGUES} dialogues of at least {TEXT_LENGTH} tokens expected, "
            f"{source} has {len(found)}; give longer dialogues to --data"
        )
    return Text(
        source=source,
        train=found[:TEXT_DIALOGUES],
        held_out=found[TEXT_DIALOGUES : 2 * TEXT_DIALOGUES],
    )
