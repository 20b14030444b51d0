"""What the folder of a finished run holds, read back for tables and figures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import read_json

_STAGES = ("prepare", "phase1", "phase2")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is shown of one run."""

    name: str
    result: dict[str, Any]
    """As in `result.json`."""
    record: dict[str, Any]
    """As in `config.json`: resolved config, fingerprint, versions."""
    stages: dict[str, dict[str, Any]]
    """What each stage found; empty where it did not run."""
    history: list[dict[str, Any]]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Return the history of one stage."""
        return [row for row in self.history if row["stage"] == stage]


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a history; a last line that was cut short is left out.

    Raises:
        CheckpointError: another line is damaged, which no kill can do.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise CheckpointError(
                    f"a JSON row a line expected, line {number} of {path} is damaged; "
                    "remove that line"
                ) from None
    return rows


def read_record(folder: Path, name: str, result: dict[str, Any] | None = None) -> RunRecord:
    """Read the folder of a run.

    Args:
        folder: of the run.
        name: what it is called beside others.
        result: where `result.json` is not written yet.

    Raises:
        CheckpointError: the run is not finished, or a file is damaged.
    """
    if result is None:
        if not (folder / "result.json").is_file():
            raise CheckpointError(
                f"a finished run's folder expected, {folder} has no result.json; "
                "finish it by the command that began it"
            )
        result = dict(read_json(folder / "result.json", "a run's result"))
    stages = {}
    for stage in _STAGES:
        path = folder / "stages" / f"{stage}.json"
        stages[stage] = read_json(path, f"the result of stage {stage}") if path.exists() else {}
    return RunRecord(
        name=name,
        result=result,
        record=read_json(folder / "config.json", "a run's config"),
        stages=stages,
        history=read_history(folder / "history.jsonl"),
    )
