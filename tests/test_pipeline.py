"""The whole job, and the command line as a user runs it, on real dialogues."""

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from helpers import QUICK, reseal, small_run
from new_llm import cli
from new_llm.bench import BENCHES
from new_llm.config import PRESETS, preset
from new_llm.errors import ConfigError
from new_llm.experiments import EXPERIMENTS
from new_llm.lab import CLAIMS
from new_llm.records import read_history
from new_llm.report import write_report


def test_a_finished_run_has_what_the_contract_says(finished: Path) -> None:
    for name in ("result.json", "report.html", "config.json"):
        assert (finished / name).is_file()
    assert (finished / "checkpoint" / "model.safetensors").is_file()
    result = json.loads((finished / "result.json").read_text())
    assert {
        "fingerprint", "verdict_phase1", "verdict_final", "evaluation", "tokens_seen", "seconds",
    } <= result.keys()  # fmt: skip
    assert result["verdict_phase1"]["token"]["verdict"] == "healthy"
    assert set(result["verdict_final"]) == {"token", "sequence"}
    for diagnosis in result["verdict_final"].values():
        assert set(diagnosis) == {"verdict", "verdicts", "scope", "measurements", "advice"}
        for row in diagnosis["measurements"].values():
            assert set(row) == {"value", "threshold", "passed"}
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["model"]["context_width"] == 32
    assert "torch" in record["versions"]
    assert not (finished / "training").exists()


def test_a_finished_run_prints_its_result_again(
    finished: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (finished / "result.json").stat().st_mtime_ns
    assert cli.main(["run", "--data", str(chats), "--out", str(finished), *QUICK]) == 0
    assert "report:" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == written


def test_another_config_may_not_have_the_folder(
    finished: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["run", "layerwise", "--data", str(chats), "--out", str(finished), *QUICK])
    assert code == 2
    assert "belongs to another config (model.cell 'convex'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "doctor"])
def test_commands_on_a_checkpoint_write_the_contracts_keys(
    finished: Path, chats: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out.json"
    arguments = [command, str(finished), "--data", str(chats), "--json", str(out)]
    assert cli.main(arguments) == 0
    found = json.loads(out.read_text())
    wanted = {
        "evaluate": {
            "loss", "perplexity", "bits_per_byte", "accuracy", "loss_assistant", "num_tokens",
            "num_bytes",
        },
        "doctor": {"verdict", "verdicts", "scope", "measurements", "advice", "sequence"},
    }  # fmt: skip
    assert set(found) == wanted[command]
    if command == "doctor":
        assert found["scope"] == "token" and found["sequence"]["scope"] == "sequence"
    assert cli.main([command, str(finished / "checkpoint"), *arguments[2:]]) == 0


def test_generate_prints_prompt_and_continuation(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(finished), "--prompt", "Hello there", "--seed", "3"]
    printed = []
    for _ in range(2):
        assert cli.main([*arguments, "--max-new-tokens", "20", "--top-k", "0"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("Hello there") and len(printed[0]) > len("Hello there\n")


def test_chat_keeps_saves_and_forgets(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = iter(["hi", f"/save {tmp_path / 'c'}", "/reset", f"/load {tmp_path / 'c'}",
                 f"/load {tmp_path / 'none'}", "/what", "", "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert cli.main(["chat", str(finished), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "bot> " in out and "commands: /reset" in out and "a saved context expected" in out
    assert (tmp_path / "c").stat().st_size < 10_000


def test_conversation_is_one_text() -> None:
    import torch

    from new_llm.checkpoint import Checkpoint
    from new_llm.config import ModelConfig, SampleConfig
    from new_llm.generate import Conversation, read
    from new_llm.model import NewLLM
    from new_llm.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.train(iter(["how are you", "fine"]), 300)
    shape = ModelConfig(context_width=16, embedding_width=16, hidden_width=16)
    model = NewLLM(shape, tokenizer.vocab_size).eval()
    loaded = Checkpoint(model=model, tokenizer=tokenizer, config={})
    talk = Conversation(loaded, SampleConfig(max_new_tokens=4, seed=1))
    answer = "".join(talk.reply("how are you"))
    fork = talk.fork()
    before = talk.context
    assert before is not None
    list(fork.reply("fine"))
    assert torch.equal(talk.context, before)  # pyright: ignore
    assert not torch.equal(fork.context, before)  # pyright: ignore
    ids = tokenizer.encode_prompt([{"role": "user", "content": "how are you"}])
    assert isinstance(answer, str)
    first = read(model, torch.tensor([ids]))
    assert first.context.shape == before.shape


def test_stages_one_by_one_are_the_run(
    chats: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    for command in ("phase1", "cache", "phase2", "run"):
        assert cli.main([command, "--data", str(chats), "--out", str(out), *QUICK]) == 0
        if command == "cache":
            contexts = out / "cache" / "contexts-00001-of-00001.f32"
            contexts.write_bytes(contexts.read_bytes()[:100])
            assert cli.main(["phase2", "--data", str(chats), "--out", str(out), *QUICK]) == 2
            assert "new-llm cache again" in capsys.readouterr().err
            # what the error says to do works
            shutil.rmtree(out / "cache")
    first, second = (json.loads((f / "result.json").read_text()) for f in (finished, out))
    assert first["evaluation"] == second["evaluation"]
    assert first["verdict_final"] == second["verdict_final"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_goes_through(name: str, chats: Path, tmp_path: Path) -> None:
    from new_llm.console import Console
    from new_llm.pipeline import run

    gate = small_run(chats, name)
    out = tmp_path / "run"
    # a narrow model after a few steps need not be healthy: the documents' own gate
    config = gate.__class__(**{**gate.__dict__, "gate": "seed"})
    result = run(config, out, console=Console(quiet=True))
    assert result["evaluation"]["loss"] > 0
    assert (result["verdict_final"]["sequence"] is None) == (config.model.scope == "token")


@pytest.mark.slow
def test_freeze_context_goes_through(chats: Path, tmp_path: Path) -> None:
    arguments = ["run", "--data", str(chats), "--out", str(tmp_path / "run"), *QUICK]
    assert cli.main([*arguments, "--phase2.freeze-context"]) == 0
    meta = json.loads((tmp_path / "run" / "cache" / "cache.json").read_text())
    prepared = json.loads((tmp_path / "run" / "stages" / "prepare.json").read_text())
    assert meta["shape"] == [prepared["train_tokens"], 2, 32]


def _empty(path: Path) -> None:
    path.touch()


def _binary(path: Path) -> None:
    path.write_bytes(b'{"messages": "\xff\xfe"}\n')


def _row(row: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(row) + "\n")

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no"),
        (_empty, "is empty"),
        (_binary, "UTF-8"),
        (_row({"text": "x"}), "'messages'"),
        (_row({"messages": [{"role": "bot", "content": "x"}]}), "'bot'"),
        (_row({"messages": [{"role": "user", "content": ""}]}), "an empty one"),
        (_row({"messages": [{"role": "user", "content": "alone"}]}), "none was left"),
    ],
)
def test_bad_dialogues_leave_nothing_behind(
    make: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    make(data)
    assert cli.main(["run", "--data", str(data), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["walk"], "a command is one of"),
        (["run", "convexx", "--out", "x"], "a preset is one of"),
        (["run"], "needs --out"),
        (["run", "--out", "x", "--phase1.max-stepz", "3"], "perhaps --phase1.max-steps"),
        (["run", "--out", "x", "--phase1.max-steps", "abc"], "--phase1.max-steps"),
        (["run", "--out", "x", "--solver.damping", "1.5"], "solver.damping must be in [0, 1)"),
        (["run", "--out", "x", "--phase2.learning-rate", "nan"], "learning_rate"),
        (["run", "--out", "x", "--gate", "open"], "'open'"),
        (["run", "--out", "x", "--model.dropout", "0.1"], "0 for the convex cell"),
        (["generate", "none", "--prompt", "x"], "holds no model.safetensors"),
        (["lab", "nothing"], "an experiment is one of"),
        (["report", "none", "--out", "x"], "has no result.json"),
        (["generate", "c", "--prompt", "x", "--temperature", "-1"], "new-llm: temperature must be"),
        (["serve", "c", "--session-minutes", "nan"], "--session-minutes needs a positive number"),
        (["bench", "quality", "--out", "a/b", "--data", "nowhere"], "train.jsonl"),
        (["lab", "confusion", "--out", "a/b", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["lab", "confusion", "--data", ""], "dialogues expected, got nothing"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("new-llm: ") and len(error.strip().splitlines()) <= 2
    assert not re.search("[╭│╰]", error)
    assert not list(tmp_path.iterdir())


def test_a_preset_may_stand_anywhere_and_options_change_it() -> None:
    for arguments in (
        ["seed-layerwise", "--out", "convex", "--data", "x", "--valid", "y"],
        ["--out", "convex", "--quiet", "seed-layerwise", "--data=x", "--valid=y"],
    ):
        options = cli.parse("run", arguments)
        assert options.out == Path("convex")
        assert options.config.preset == "seed-layerwise"
        assert options.config.model == preset("seed-layerwise").model
        assert (options.config.data.source, options.config.data.valid) == ("x", "y")
    assert cli.parse("run", ["--out", "x"]).config == preset("convex")
    frozen = cli.parse("run", ["--out", "x", "--phase2.freeze-context", "demo"])
    assert frozen.config.phase2.freeze_context and frozen.config.preset == "demo"
    for named in (["--preset=demo"], ["--preset", "demo"]):
        assert cli.parse("run", [*named, "--out", "x"]).config == preset("demo")


def test_none_is_a_word_of_the_command_line() -> None:
    given = ["--phase2.max-steps", "none", "--data.valid=none", "--track", "none", "--seed", "3"]
    options = cli.parse("run", ["--out", "none", *given, "demo"])
    assert options.config.phase2.max_steps is None and options.config.data.valid is None
    # where nothing may be left open it is a word like others
    assert options.track == "none" and options.out == Path("none")
    assert cli.parse("ui", ["x", "--port", "none"]).port is None
    assert cli.parse("bench", ["tasks", "--threads=none"]).threads is None


@pytest.mark.parametrize(
    ("command", "names"),
    [("run", PRESETS), ("lab", [*EXPERIMENTS, CLAIMS]), ("bench", BENCHES)],
)
def test_help_names_what_may_be_chosen(
    command: str, names: Iterable[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    said = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert set(names) <= said


def test_an_interrupted_talk_does_not_deny_what_it_saved(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("new_llm.terminal.Chat.run", interrupted)
    assert cli.main(["chat", str(finished)]) == 130
    assert "what /save wrote is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["demo", "--preset=layerwise"], "got demo and layerwise"),
        (["demo", "convex"], "got demo and convex"),
        (["--preset=nonsense"], "a preset is one of"),
        (["--out", "x", "--preset"], "--preset"),
        (["layerwise", "--phase2.engine", "gate-scan"], "auto, scan or jacobi for a seed cell"),
    ],
)
def test_a_run_that_is_not_what_it_is_called_is_refused(arguments: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        cli.parse("run", ["--out", "y", *arguments])


def test_a_nan_stops_with_3_and_resumable_files(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--data", str(chats), "--out", str(tmp_path / "x"), *QUICK]
    assert cli.main([*arguments, "--phase2.learning-rate", "1e30"]) == 3
    error = capsys.readouterr().err
    assert "must stay finite" in error and "Traceback" not in error
    assert not (tmp_path / "x" / "checkpoint").exists()
    assert not (tmp_path / "x" / "result.json").exists()


def test_a_failed_gate_stops_with_3_and_says_what_to_try(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "layerwise", "--data", str(chats), "--out", str(tmp_path / "x"), *QUICK]
    assert cli.main([*arguments, "--phase1.max-steps", "1"]) == 3
    error = capsys.readouterr().err
    assert "the strict gate needs the verdict healthy" in error and "--gate seed" in error
    assert (tmp_path / "x" / "phase1").is_dir()
    assert not (tmp_path / "x" / "cache").exists()


@pytest.mark.parametrize("harm", ["truncate", "flip", "tokenizer", "missing"])
def test_damaged_checkpoints_are_refused(
    harm: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished / "checkpoint", tmp_path / "c")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if harm == "truncate":
        weights.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif harm == "missing":
        weights.unlink()
    else:
        from new_llm.tokenizer import ChatTokenizer

        ChatTokenizer.train(iter(["other text"]), 300).save(folder)
    assert cli.main(["generate", str(folder), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert {"truncate": "truncated", "flip": "changed", "tokenizer": "tokenizer.json must match",
            "missing": "model.safetensors"}[harm] in error  # fmt: skip


def test_a_damaged_cache_is_refused(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    arguments = ["--data", str(chats), "--out", str(out), *QUICK]
    assert cli.main(["cache", *arguments]) == 0
    path = out / "cache" / "contexts-00001-of-00001.f32"
    path.write_bytes(path.read_bytes()[:-8])
    assert cli.main(["run", *arguments]) == 2
    assert "contexts-00001-of-00001.f32" in capsys.readouterr().err


def _limited(arguments: list[str], num_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run the command line where no file may grow beyond a size: a disk that is full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return subprocess.run(
        [sys.executable, "-m", "new_llm", *arguments],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.slow
def test_a_file_that_cannot_grow_stops_with_3(chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    arguments = ["run", "--data", str(chats), "--out", str(out), *QUICK]
    stopped = _limited(arguments, 60_000)
    assert stopped.returncode == 3, stopped.stderr
    assert "Traceback" not in stopped.stderr and "disk is full" in stopped.stderr
    assert not list(out.rglob("*.part"))
    assert cli.main(arguments) == 0


def test_the_report_is_one_offline_page(finished: Path, tmp_path: Path) -> None:
    page = (finished / "report.html").read_text()
    # the name once, then what it is
    assert "a: convex cell, sequence scope, 2 blocks, preset convex" in page
    # four of Phase 1 and 2, four of the final contexts, a map and its cosines a block
    assert page.count("<svg") == 4 + 4 + 2 * 2
    # pictures lie in the page itself
    assert not re.search(r'(?:src|href)="(?!#|data:)', page.replace("xlink:href", "href"))
    assert "url(http" not in page and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    other = shutil.copytree(finished, tmp_path / "other")
    result = json.loads((other / "result.json").read_text())
    result["samples"][0][0]["assistant"] = "<script>alert(1)</script>"
    reseal(other / "result.json", samples=result["samples"])
    write_report([finished, other], tmp_path / "both.html")
    both = (tmp_path / "both.html").read_text()
    assert "<script>" not in both and "&lt;script&gt;" in both
    assert "a beside other" in both


def test_a_history_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    rows = [{"stage": "phase1", "step": 1}, {"stage": "phase1", "step": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    assert read_history(path) == rows
    assert read_history(tmp_path / "none") == []


@pytest.mark.ultrachat
@pytest.mark.slow
@pytest.mark.parametrize("name", ["convex", "seed-sequential"])
def test_real_ultrachat_goes_through(name: str, ultrachat: Path, tmp_path: Path) -> None:
    # scoring all held-out tokens over GPT-2's vocabulary would take minutes
    valid = tmp_path / "valid.jsonl"
    with (ultrachat / "valid.jsonl").open() as rows:
        valid.write_text("".join(itertools.islice(rows, 10)))
    arguments = ["run", name, "--data", str(ultrachat / "train.jsonl"), "--out",
                 str(tmp_path / "x"), "--valid", str(valid), "--quiet",
                 "--data.max-dialogues", "20", "--phase1.max-steps", "40",
                 "--phase1.literal-dialogues", "0", "--phase2.max-steps", "3",
                 "--phase2.evaluations", "0", "--model.context-width", "64",
                 "--model.embedding-width", "64", "--data.vocab-size", "1000"]  # fmt: skip
    assert cli.main(arguments) == 0
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert result["evaluation"]["num_bytes"] > 10_000


def _run_shell(
    arguments: list[str], *, shell: str = '"$@"', **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user's shell does; `shell` holds the redirections."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}", "bash", sys.executable, "-m", "new_llm",
         *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **changes},
        check=False,
    )  # fmt: skip


def test_output_that_nobody_reads_is_no_failure(finished: Path) -> None:
    """`head` leaves after a line; what was asked for was done."""
    printed = _run_shell(["generate", str(finished), "--prompt", "hi"], shell='"$@" | true')
    assert (printed.returncode, printed.stderr) == (0, "")
    shown = _run_shell(["run", "--help"], shell='"$@" | head -1')
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_closed_standard_input_is_said_in_one_line(finished: Path) -> None:
    closed = _run_shell(["chat", str(finished)], shell='"$@" <&-')
    assert closed.returncode == 2
    assert "standard input" in closed.stderr and "Traceback" not in closed.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_text_that_is_no_utf8_is_said_in_one_line(
    command: str, finished: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = b"bad \xff bytes".decode("utf-8", "surrogateescape")
    said = iter([broken, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    arguments = [command, str(finished), *(["--prompt", broken] if command == "generate" else [])]
    code = cli.main(arguments)
    shown = capsys.readouterr()
    # a conversation goes on after it
    assert code == (2 if command == "generate" else 0)
    assert "UTF-8 text expected" in (shown.err if command == "generate" else shown.out)


def test_a_prompt_may_look_like_an_option(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(finished), "--prompt", "--seed", "--max-new-tokens", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("--seed")


@pytest.mark.parametrize("seed", ["-1", str(2**31), "9" * 23])
@pytest.mark.parametrize("command", ["run", "generate"])
def test_a_seed_out_of_range_is_refused_before_any_work(
    command: str, seed: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = {
        "run": ["--out", str(tmp_path / "x"), "--sample.seed", seed],
        "generate": [str(finished), "--prompt", "x", "--seed", seed],
    }
    assert cli.main([command, *where[command]]) == 2
    assert "seed must be in [0, 2147483648)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["evaluate", "doctor", "report"])
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    command: str, finished: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the place is looked at first")

    monkeypatch.setattr("new_llm.checkpoint.load_checkpoint", work)
    monkeypatch.setattr("new_llm.report.read_record", work)
    option = "--out" if command == "report" else "--json"
    data = [] if command == "report" else ["--data", str(chats)]
    for place in (tmp_path, Path("/proc/x.json")):
        assert cli.main([command, str(finished), *data, option, str(place)]) == 2
        error = capsys.readouterr().err
        assert str(place) in error and "choose another place" in error


def test_a_context_that_cannot_be_saved_does_not_end_the_talk(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["/save /proc/x/y", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert cli.main(["chat", str(finished)]) == 0
    assert "/proc/x/y must be written" in capsys.readouterr().out


def test_safetensors_on_a_full_disk_stop_with_3(tmp_path: Path) -> None:
    """The library has an error of its own for what the system says."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from new_llm.checkpoint import save_tensors\n"
        "from new_llm.errors import DiskFullError\n"
        "try:\n"
        "    save_tensors(Path(sys.argv[1]), {'a': torch.zeros(100_000)})\n"
        "except DiskFullError as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    shell = 'ulimit -f 10; trap "" XFSZ; "$1" -c "$CODE" "$PLACE"'
    stopped = _run_shell([], shell=shell, CODE=code, PLACE=str(tmp_path / "x"))
    assert stopped.returncode == 3, stopped.stderr


def test_a_run_whose_parts_are_gone_says_what_to_delete(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    arguments = ["--data", str(chats), "--out", str(out), *QUICK]
    assert cli.main(["phase1", *arguments]) == 0
    shutil.rmtree(out / "phase1")
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"delete {out / 'stages' / 'phase1.json'}" in error
    (out / "stages" / "phase1.json").unlink()
    (out / "training").mkdir()
    assert cli.main(["run", *arguments]) == 2
    assert f"delete {out / 'training'} to begin that phase again" in capsys.readouterr().err
    (out / "training").rmdir()
    assert cli.main(["run", *arguments]) == 0
    # a page that was deleted is written again
    (out / "report.html").unlink()
    assert cli.main(["run", *arguments]) == 0
    assert (out / "report.html").is_file()


def test_bad_rows_may_be_skipped_wherever_data_is_read(
    finished: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '{"messages": [{"role": "bot", "content": "x"}]}\n')
    assert cli.main(["evaluate", str(finished), "--data", str(bad)]) == 2
    advice = "--data.on-bad-row skip"
    assert advice in capsys.readouterr().err
    for command in ("evaluate", "doctor"):
        assert cli.main([command, str(finished), "--data", str(bad), *advice.split()]) == 0
        said = capsys.readouterr().out.replace("\n", "")
        assert "1 of 25 rows are no dialogues" in said and "got 'bot'" in said
    few = tmp_path / "few.jsonl"
    few.write_text("".join(bad.read_text().splitlines(keepends=True)[-5:]))
    skip = ["--data.on-bad-row", "skip", "--valid", str(few)]
    run = ["run", *QUICK, "--gate", "seed", "--data", str(bad), *skip, "--out", str(tmp_path / "r")]
    assert cli.main(run) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "1 of 25 rows are no dialogues" in said
    assert "1 held-out rows are no dialogues" in said


def test_to_learn_from_the_assistant_needs_an_assistant(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "silent.jsonl"
    silent.write_text(chats.read_text().replace("assistant", "user"))
    run = ["run", *QUICK, "--data", str(silent), "--out", str(tmp_path / "r")]
    assert cli.main([*run, "--phase2.loss-on", "assistant"]) == 2
    assert "the assistant says expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "written", [{"q2": 0.5}, {"q_inf": 0.1}, {"rate": 0.01}, {"rate": "x"}, None]
)
def test_a_checkpoint_of_another_contraction_is_refused(
    written: dict[str, float] | None,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(finished / "checkpoint", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    found = config["contraction"]
    assert all(block["q2"] < 1 and 0 < block["rate"] <= block["q2"] for block in found)
    changed = None if written is None else [{**found[0], **written}, *found[1:]]
    reseal(folder / "config.json", contraction=changed)
    assert cli.main(["generate", str(folder), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    wrong = "must hold q2, q_inf and rate"
    if written is not None and "x" not in written.values():
        wrong = f"{next(iter(written))} of"
    assert wrong in error


def test_a_config_of_wrong_types_is_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished / "checkpoint", tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    reseal(folder / "config.json", model={**config["model"], "hidden_width": "x"})
    assert cli.main(["generate", str(folder), "--prompt", "x"]) == 2
    assert "hidden_width must be a whole number, got 'x'" in capsys.readouterr().err


def test_lab_refuses_dialogues_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lab", "scaling", "--data", str(tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
