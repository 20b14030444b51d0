"""The folder of a run: its files, to which config it belongs, and what it holds when it is done."""

import importlib.metadata
import json
import operator
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .config import RunConfig, to_dict
from .errors import CheckpointError, shown
from .files import disk_error, read_sealed, sha256, write_sealed

# of the JSON records of a run's folder
FORMAT_VERSION = 1
_STAGES = ("prepare", "phase1", "phase2", "evaluate")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The files of a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, its fingerprint, and versions."""
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        """Tokenised dialogues and tokenizer."""
        return self.path / "data"

    @property
    def stages(self) -> Path:
        """What each finished stage found, `STAGE.json`."""
        return self.path / "stages"

    @property
    def phase1_checkpoint(self) -> Path:
        """The model after Phase 1."""
        return self.path / "phase1"

    @property
    def cache(self) -> Path:
        """Cached contexts."""
        return self.path / "cache"

    @property
    def training(self) -> Path:
        """State of an unfinished Phase 1 or Phase 2."""
        return self.path / "training"

    @property
    def checkpoint(self) -> Path:
        """The final model."""
        return self.path / "checkpoint"

    @property
    def snapshots(self) -> Path:
        """Models of Phase 2 that were kept on the way."""
        return self.path / "snapshots"

    @property
    def history(self) -> Path:
        """A JSON row for each logged step."""
        return self.path / "history.jsonl"

    @property
    def tracking(self) -> Path:
        """What trackers write that write files."""
        return self.path / "tracking"

    @property
    def result(self) -> Path:
        """The result; its presence means that the run is finished."""
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    def stage(self, name: str) -> Path:
        """What a stage found; its presence means that the stage is finished."""
        return self.stages / f"{name}.json"

    def read(self, path: Path, kind: str) -> dict[str, Any]:
        """Read a record of this folder.

        Raises:
            CheckpointError: it is missing, damaged or changed.
        """
        remedy = "put the original back, or begin again in a new --out"
        return read_sealed(path, kind, version=FORMAT_VERSION, remedy=remedy)

    def write(self, path: Path, values: dict[str, Any]) -> None:
        """Write a record of this folder, with its checksum."""
        write_sealed(path, values, version=FORMAT_VERSION)


def open_folder(path: Path, config: RunConfig) -> RunFolder:
    """Make a run's folder, or open the one that belongs to this very config.

    Raises:
        CheckpointError: the folder belongs to another config, or holds other files.
    """
    folder = RunFolder(path=path)
    wanted = json.loads(json.dumps(to_dict(config)))
    if folder.config.exists():
        theirs = folder.read(folder.config, "a run's config").get("config", {})
        if theirs != wanted:
            changed = "; ".join(_differences(theirs, wanted)[:4])
            raise CheckpointError(
                f"{path} belongs to another config ({changed}); "
                "choose a new --out, or repeat the command that made it"
            )
        return folder
    if path.exists() and not _is_new(path):
        raise CheckpointError(
            f"an empty or new folder expected for --out, {path} holds other files; "
            "choose a new --out"
        )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "tokenizers", "datasets", "safetensors", "numpy")
    }
    record = {
        "config": wanted,
        "fingerprint": config.fingerprint(),
        "versions": {"new-llm": __version__, "python": platform.python_version(), **versions},
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder.stages.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
    folder.write(folder.config, record)
    return folder


def _is_new(path: Path) -> bool:
    """Return whether a folder holds nothing, or what a run left that ended before its config."""
    if not path.is_dir():
        return False
    stages, part = path / "stages", path / ".config.json.part"
    begun = stages.is_dir() and not any(stages.iterdir())
    return all((found == stages and begun) or found == part for found in path.iterdir())


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [
            row
            for key in keys
            for row in _differences(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if theirs == ours else [f"{name} {shown(theirs)}, asked for {shown(ours)}"]


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
            row = json.loads(line)
            # what is asked of every row
            row["stage"].startswith("phase")
            operator.index(row["step"] if "step" in row else row["epoch"])
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
            if number < len(lines):
                raise CheckpointError(
                    f"a JSON row with stage, and step or epoch, a line expected, line {number} of "
                    f"{path} is damaged; remove that line"
                ) from None
        else:
            rows.append(row)
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
    files = RunFolder(path=folder)
    if result is None:
        if not files.result.is_file():
            raise CheckpointError(
                f"a finished run's folder expected, {folder} has no result.json; "
                "finish it by the command that began it"
            )
        result = files.read(files.result, "a run's result")
    stages = {}
    for stage in _STAGES:
        path = files.stage(stage)
        stages[stage] = files.read(path, f"the result of stage {stage}") if path.exists() else {}
    written = stages["phase2"].get("history")
    if written is not None and (not files.history.is_file() or sha256(files.history) != written):
        raise CheckpointError(
            f"{files.history} must match its checksum in {files.stage('phase2')}, but it is "
            "missing, truncated or changed; put the original back"
        )
    return RunRecord(
        name=name,
        result=result,
        record=files.read(files.config, "a run's config"),
        stages=stages,
        history=read_history(files.history),
    )
