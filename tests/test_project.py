"""What holds of the project as a whole: layout, import cost, help."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from new_llm import cli

SOURCE = Path(__file__).parents[1] / "src" / "new_llm"
# a module imports only modules that stand before it
ORDER = [
    "errors", "config", "configuration_new_llm", "console", "distributed", "watch", "files",
    "dialogues",
    "tokenizer", "store", "preparation", "data", "cell", "counts", "fixed_point", "scan",
    "recurrence", "measurements", "doctor", "model", "modeling_new_llm", "announce", "stepper",
    "card", "checkpoint", "resume", "evaluate", "phase1", "cache", "optimiser",
    "phase2", "generate", "baselines", "peers",
    "records", "plots", "report", "tracking", "pipeline", "specimens", "runner", "trials",
    "laboratory", "experiments", "claims", "lab", "speed", "quality", "ablations", "tasks",
    "results", "bench",
    "view", "terminal", "address", "serve", "harness", "export", "ui", "cli", "__main__",
]  # fmt: skip


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return names - {"__version__"}


def test_modules_import_only_modules_above_them() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == {*ORDER, "__init__"}
    for place, name in enumerate(ORDER):
        below = _imported(SOURCE / f"{name}.py") - set(ORDER[:place])
        assert not below, f"{name} imports {below}"


@pytest.mark.parametrize("name", ["fixed_point", "doctor", "cell", "scan", "recurrence"])
def test_the_core_reads_no_config(name: str) -> None:
    assert "config" not in _imported(SOURCE / f"{name}.py")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from new_llm.cli import main; main(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    begun = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # far above what it takes, far below what importing torch takes on a slow machine
    assert time.monotonic() - begun < 5
    assert out.stdout.strip().endswith("[]")
    for command in cli.COMMANDS:
        assert command in out.stdout


def test_public_names_are_there() -> None:
    import new_llm

    for name in new_llm.__all__:
        assert getattr(new_llm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = new_llm.nothing


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert command in shown
    assert "(default: )" not in shown
