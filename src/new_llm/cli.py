"""The command line: parses, calls, prints. Each command imports what it needs."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro

from .config import PRESETS, RunConfig, SampleConfig, preset
from .console import Console, discard_output, is_main_process
from .errors import ConfigError, DiskFullError, NewLLMError

Options = TypeVar("Options")

# short names of the options that everybody types, for the commands that take a config
_RUN_ALIASES = {"--data": "--data.source", "--valid": "--data.valid"}
# long names of a config's options, for the commands that take none
_DATA_ALIASES = {"--data.on-bad-row": "--on-bad-row", "--data.split": "--split"}
# more than any machine that we know of has cores for
_MOST_THREADS = 4096


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A whole run, or one stage of it. Resumes an unfinished DIR.

    A preset may stand before the options: seed-sequential, seed-layerwise, layerwise, convex or
    demo; without one it is convex. `--data` is short for `--data.source`, `--valid` for
    `--data.valid`.
    """

    out: Path
    """Folder of the run."""
    quiet: bool = False
    """Show results only, no progress."""
    track: str = "auto"
    """Who else is handed the run's numbers: tensorboard, wandb, trackio, mlflow, ..., commas join
    several; auto is TensorBoard where it is installed; none."""
    fsdp: bool = False
    """Of several processes, each keeps a part of the model in Phase 2: for large vocabularies."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=RunConfig
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue a prompt."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    prompt: str
    """Text to continue."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SampleConfig
    )


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to a checkpoint in the terminal; /help lists what can be done with its context."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SampleConfig
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve a checkpoint to clients of OpenAI's chat API; needs the extra `serve`."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches it may talk, there are no passwords."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    session_minutes: float = 30.0
    """Minutes after which the context of an unused session is forgotten."""
    max_sessions: int = 10_000
    """Contexts that are kept; the one that was used longest ago gives way."""
    max_new_tokens: int = 256
    """Most tokens of an answer, where a request does not say."""
    temperature: float = SampleConfig.temperature
    """As `generate` has it, where a request does not say."""
    top_k: int = SampleConfig.top_k
    """As `generate` has it, where a request does not say."""
    top_p: float = SampleConfig.top_p
    """As `generate` has it, where a request does not say."""


@dataclass(frozen=True, kw_only=True)
class UiOptions:
    """Open a page to talk at, and to watch the context while it talks; needs the extra `ui`."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches it may talk, there are no passwords."""
    port: int | None = None
    """Port to listen at; none takes the first free one from 7860 on."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SampleConfig
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write one step as ONNX, compared with this model in onnxruntime; needs the extra `onnx`."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    out: Path
    """New folder for step.onnx, tokenizer and step.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Loss, perplexity, bits per byte and accuracy on dialogues."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    data: str
    """Dialogues: JSONL, Parquet or a hub name."""
    split: str = "test_sft"
    """Split, where the data is a hub name."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that is not a dialogue does: stop, or be left out."""
    json: Path | None = None
    """Also write the result here."""
    quiet: bool = False
    """Show results only, no progress."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Measure fixed points and give a verdict; with data in sequence scope too."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run's folder or its checkpoint."""
    data: str | None = None
    """Held-out dialogues: JSONL, Parquet or a hub name."""
    split: str = "test_sft"
    """Split, where the data is a hub name."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that is not a dialogue does: stop, or be left out."""
    json: Path | None = None
    """Also write the result here."""
    quiet: bool = False
    """Show results only, no progress."""


@dataclass(frozen=True, kw_only=True)
class LabOptions:
    """Repeat an experiment of the founding documents: their value, ours, agreement and why."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|all")]
    """The experiment: untrained, trained-small, scaling, dialogue-512, multi-sample, metrics,
    clipping, warmup, depth, dropout, sweep, repetition, trained-search, confusion or claims."""
    data: str | None = None
    """Dialogues, for experiments on real text."""
    out: Path | None = None
    """Folder that keeps what is finished, so that the command can be repeated."""
    workers: int | None = None
    """Processes of one thread each; none takes one a core."""
    json: Path | None = None
    """Also write the rows here."""
    quiet: bool = False
    """Show results only, no progress."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure speed, memory and quality against peers in one run: ratios count, seconds drift.

    `all` is all but `quality`, `long`, `ablations` and `tasks`, which train for hours. An option
    that a benchmark does not take is refused.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|all")]
    """The benchmark: engines, recurrence, sweeps, token-scope, generation, flatness, document,
    memory, quality, long, ablations or tasks."""
    checkpoint: Path | None = None
    """A trained model's folder; without one, weights are as the default preset draws them."""
    data: str | None = None
    """Dialogues, for benchmarks on real text; of `quality`, `long` and `ablations` a folder with
    train.jsonl and valid.jsonl, which are mixed with the default chats."""
    out: Path | None = None
    """Folder that keeps what is finished, so that the command can be repeated."""
    lengths: tuple[int, ...] = (64, 512, 2048, 16384)
    """Positions of a text."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Sequences side by side."""
    width: int = 256
    """Width of contexts, embeddings and hidden layers, where no checkpoint decides it."""
    tokens: int | None = None
    """Tokens of the longest text; ids of `token-scope`, at most GPT-2's; those that a model of
    `quality`, `long` or `ablations` is trained on."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where; `token-scope` and `generation` are measured on the CPU."""
    threads: int | None = None
    """Threads of PyTorch; none leaves them as they are."""
    workers: int | None = None
    """Processes of one thread that train side by side, where hours are trained; none is one a
    core."""
    json: Path | None = None
    """Also write the rows here."""
    page: Path | None = None
    """Also write the tables here, as Markdown."""
    quiet: bool = False
    """Show results only, no progress."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML page of one or several finished runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="DIR...", help_behavior_hint="(required)"),
    ]
    """Folders of finished runs, at least one."""
    out: Path
    """The page."""


def _run(options: RunOptions) -> None:
    from .files import understood
    from .pipeline import run
    from .tracking import chosen_trackers

    console = Console(quiet=options.quiet)
    trackers = chosen_trackers(options.track)
    result = run(
        options.config, options.out, console=console, trackers=trackers, sharded=options.fsdp
    )
    if is_main_process():
        with understood(options.out / "result.json", "a run's result"):
            show_result(result, options.out, console)


@contextlib.contextmanager
def _stages(options: RunOptions) -> Iterator[Any]:
    """Yield the run whose stages are asked for."""
    from .pipeline import opened
    from .tracking import chosen_trackers

    console, trackers = Console(quiet=options.quiet), chosen_trackers(options.track)
    with opened(options.config, options.out, console, trackers, sharded=options.fsdp) as job:
        yield job


def show_result(result: dict[str, Any], out: Path, console: Console) -> None:
    """Print what a finished run found."""
    evaluation = result["evaluation"]
    rows: list[list[object]] = [
        ["validation loss, nats a token", evaluation["loss"]],
        ["Kneser-Ney bigram, same tokens", result["bigram_loss"]],
        ["below the bigram", result["bigram_loss"] - evaluation["loss"]],
        ["loss on assistant tokens", evaluation["loss_assistant"]],
        ["perplexity", evaluation["perplexity"]],
        ["bits per byte", evaluation["bits_per_byte"]],
        ["accuracy", evaluation["accuracy"]],
        ["tokens seen", result["tokens_seen"]],
    ]
    show_convergence(result["convergence"], console)
    console.table("Result on held-out dialogues", ["quantity", "value"], rows)
    for scope, diagnosis in result["verdict_final"].items():
        if diagnosis is not None:
            others = ", ".join(diagnosis["verdicts"][1:])
            also = f" (also {others})" if others else ""
            console.show(f"verdict, {scope} scope: {diagnosis['verdict']}{also}")
            if diagnosis["verdict"] != "healthy":
                console.show(f"  what to try: {diagnosis['advice'][0]}")
    for turns in result["samples"]:
        console.show("\nsample conversation")
        for turn in turns:
            console.show(f"  user       {turn['user']}\n  assistant  {turn['assistant']}")
    console.show(f"\nreport: {out / 'report.html'}\ncheckpoint: {out / 'checkpoint'}")


def show_convergence(convergence: dict[str, Any], console: Console) -> None:
    """Print how tokens converge by each metric, untrained beside trained."""
    columns = ["metric", "converged", "mean iterations", "of the converged", "mean change"]
    rows = [
        [
            name,
            f"{row['convergence_rate']:.1%}",
            row["mean_iterations"],
            row["mean_iterations_converged"],
            row["mean_change"],
        ]
        for name, row in convergence.items()
    ]
    console.table("Convergence of tokens after Phase 1", columns, rows)


def _phase1(options: RunOptions) -> None:
    with _stages(options) as job:
        found = job.phase1()
    if not is_main_process():
        return
    show_convergence(found["convergence"], job.console)
    job.console.show(f"verdict after Phase 1: {found['verdict']['token']['verdict']}")


def _cache(options: RunOptions) -> None:
    with _stages(options) as job:
        job.cache()


def _phase2(options: RunOptions) -> None:
    with _stages(options) as job:
        job.phase2()


def _generate(options: GenerateOptions) -> None:
    from .checkpoint import load_checkpoint
    from .generate import generate

    loaded = load_checkpoint(options.checkpoint)
    print(options.prompt + generate(loaded, options.prompt, options.sample))


def _chat(options: ChatOptions) -> None:
    from .checkpoint import load_checkpoint
    from .terminal import Chat

    if sys.stdin is None:
        raise ConfigError(
            "something to read expected on standard input, it is closed; use new-llm generate"
        )
    Chat(load_checkpoint(options.checkpoint), options.sample).run()


def _serve(options: ServeOptions) -> None:
    sample = SampleConfig(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p,
    )  # fmt: skip
    if not 0 < options.session_minutes < math.inf or options.max_sessions < 1:
        raise ConfigError(
            "--session-minutes needs a positive number and --max-sessions at least 1, got "
            f"{options.session_minutes:g} and {options.max_sessions}"
        )
    with _needs_extra("serve"):
        from .serve import Endpoint, Sessions, serve
    from .checkpoint import load_checkpoint

    loaded = load_checkpoint(options.checkpoint)
    sessions = Sessions(
        checkpoint=loaded, config=sample, minutes=options.session_minutes,
        most=options.max_sessions,
    )  # fmt: skip
    endpoint = Endpoint(_called(options.checkpoint), sessions)
    serve(endpoint, host=options.host, port=options.port, say=lambda line: print(line, flush=True))


def _ui(options: UiOptions) -> None:
    with _needs_extra("ui"):
        from .ui import Page
    from .address import listening
    from .checkpoint import load_checkpoint

    loaded = load_checkpoint(options.checkpoint)
    page = Page(loaded, options.sample, _called(options.checkpoint))
    # where a port is taken, Gradio would try others
    listening(options.host, options.port or 0).close()
    blocks, url = page.launch(host=options.host, port=options.port)
    print(f"{page.name} at {url} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        blocks.close(verbose=False)


def _called(checkpoint: Path) -> str:
    """Return what a checkpoint is called: its run."""
    given = checkpoint.resolve()
    return given.parent.name if given.name == "checkpoint" else given.name


def _export(options: ExportOptions) -> None:
    with _needs_extra("onnx"):
        for package in ("onnxruntime", "onnxscript"):
            importlib.import_module(package)
    from .checkpoint import load_checkpoint
    from .export import export_onnx

    about = export_onnx(load_checkpoint(options.checkpoint), options.out)
    print(f"largest relative difference of onnxruntime: {about['largest_relative_difference']:.2g}")
    print(options.out / "step.onnx")


@contextlib.contextmanager
def _needs_extra(name: str) -> Iterator[None]:
    """Say which extra is missing where an import fails.

    Raises:
        ConfigError: a package of another project is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the package {error.name} expected, it is not installed; pip install "new-llm[{name}]"'
        ) from None


def _evaluate(options: EvaluateOptions) -> None:
    from .checkpoint import load_checkpoint
    from .evaluate import evaluate

    _require_file(options.json)
    loaded = load_checkpoint(options.checkpoint)
    console = Console(quiet=options.quiet)
    with (
        _dialogues(options, options.data, loaded, console) as store,
        console.track("evaluation", store.num_tokens) as advance,
    ):
        result = evaluate(loaded.model, store, advance=advance).to_dict()
    console.table("Evaluation", ["quantity", "value"], list(result.items()))
    _write_json(options.json, result)


@contextlib.contextmanager
def _dialogues(
    options: EvaluateOptions | DoctorOptions, source: str, loaded: Any, console: Console
) -> Iterator[Any]:
    """Yield all dialogues as a store, and say which rows were left out."""
    from .data import temporary_store
    from .dialogues import ReadReport

    report = ReadReport()
    with temporary_store(
        source, options.split, loaded.tokenizer, on_bad_row=options.on_bad_row, report=report
    ) as store:
        if report.left_out is not None:
            console.show(report.left_out)
        yield store


def _doctor(options: DoctorOptions) -> None:
    from .checkpoint import load_checkpoint
    from .evaluate import sequence_verdict, token_verdict

    _require_file(options.json)
    loaded = load_checkpoint(options.checkpoint)
    console = Console(quiet=options.quiet)
    diagnoses = []
    with console.track("measuring", 1 if options.data is None else 2) as advance:
        if options.data is not None:
            with _dialogues(options, options.data, loaded, console) as store:
                diagnoses.append(sequence_verdict(loaded.model, store, trained=True))
            advance(1, "sequence scope")
        diagnoses.insert(0, token_verdict(loaded.model))
        advance(1, "token scope")
    for diagnosis in diagnoses:
        rows = [
            [name, row.value, row.threshold, row.passed]
            for name, row in diagnosis.measurements.items()
        ]
        console.table(f"{diagnosis.scope} scope", ["measurement", "value", "wanted", "ok"], rows)
        console.show(f"verdict, {diagnosis.scope} scope: {', '.join(diagnosis.verdicts)}")
        console.show("what to try: " + "; ".join(diagnosis.advice) + "\n")
    token = diagnoses[0].to_dict()
    _write_json(
        options.json,
        token if len(diagnoses) == 1 else token | {"sequence": diagnoses[1].to_dict()},
    )


def _lab(options: LabOptions) -> None:
    from .lab import run_lab

    _require_file(options.json)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers needs at least 1, got {options.workers}")
    console = Console(quiet=options.quiet)
    rows = run_lab(
        options.name,
        data=options.data,
        out=options.out,
        console=console,
        num_workers=options.workers,
    )
    _write_json(options.json, rows)


def _bench(options: BenchOptions) -> None:
    from .bench import run_bench

    _require_file(options.json)
    _require_file(options.page)
    asked = (options.tokens, options.threads, options.workers)
    given = [number for number in asked if number is not None]
    numbers = (*options.lengths, *options.batches, *given, options.width)
    crowded = max(options.threads or 1, options.workers or 1) > _MOST_THREADS
    empty = not options.lengths or not options.batches
    if min(numbers) < 1 or options.width % 8 or empty or crowded:
        raise ConfigError(
            "--lengths, --batches, --tokens, --threads and --workers need numbers of at least 1, "
            f"the last two of at most {_MOST_THREADS}, "
            f"--width a multiple of 8, which heads share, got {options.lengths}, "
            f"{options.batches}, {given} and {options.width}"
        )
    rows = run_bench(
        options.name,
        console=Console(quiet=options.quiet),
        out=options.out,
        checkpoint=options.checkpoint,
        data=options.data,
        lengths=tuple(sorted(options.lengths)),
        batches=tuple(sorted(options.batches)),
        width=options.width,
        tokens=options.tokens,
        device=options.device,
        threads=options.threads,
        num_workers=options.workers,
        page=options.page,
    )
    _write_json(options.json, rows)


def _report(options: ReportOptions) -> None:
    from .report import write_report

    _require_file(options.out)
    write_report(list(options.runs), options.out)
    print(options.out)


def _require_file(path: Path | None) -> None:
    from .files import require_file

    if path is not None:
        require_file(path)


def _write_json(path: Path | None, value: Any) -> None:
    from .files import write_json

    if path is not None:
        write_json(path, value)


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    options: type
    call: Callable[[Any], None]
    takes_preset: bool = False
    """Whether a preset may stand before the options."""
    resumes: Callable[[Any], bool] = lambda options: False
    """Whether the same command goes on where it was interrupted."""
    left: str = "nothing was written"
    """What there is of it after an interruption, otherwise."""


def _always(options: Any) -> bool:
    return True


def _if_kept(options: Any) -> bool:
    return options.out is not None


COMMANDS = {
    "run": Command(RunOptions, _run, takes_preset=True, resumes=_always),
    "phase1": Command(RunOptions, _phase1, takes_preset=True, resumes=_always),
    "cache": Command(RunOptions, _cache, takes_preset=True, resumes=_always),
    "phase2": Command(RunOptions, _phase2, takes_preset=True, resumes=_always),
    "generate": Command(GenerateOptions, _generate),
    "chat": Command(ChatOptions, _chat, left="what /save wrote is kept"),
    "serve": Command(ServeOptions, _serve),
    "ui": Command(UiOptions, _ui),
    "export": Command(ExportOptions, _export),
    "evaluate": Command(EvaluateOptions, _evaluate),
    "doctor": Command(DoctorOptions, _doctor),
    "lab": Command(LabOptions, _lab, resumes=_if_kept),
    "bench": Command(BenchOptions, _bench, resumes=_if_kept),
    "report": Command(ReportOptions, _report),
}

_USAGE = """usage: new-llm COMMAND ...

Language models whose memory of a text is one vector that settles at a fixed point.

  run [PRESET] --out DIR [--data PATH|HUB_NAME] [--valid PATH] [--gate strict|seed]
                         the whole job: data, Phase 1, verdict, cache, Phase 2, text, report
  phase1, cache, phase2  one stage of it, same options
  generate CKPT --prompt TEXT         continue a prompt
  chat CKPT                           a conversation in the terminal
  serve CKPT                          an endpoint for clients of OpenAI's chat API
  ui CKPT                             a page to talk at, and to watch the context
  export CKPT --out DIR               one step as ONNX, compared with onnxruntime
  evaluate CKPT --data PATH           loss, perplexity, bits per byte, accuracy
  doctor CKPT [--data PATH]           are the fixed points real? measurements and verdict
  lab NAME|all                        an experiment of the founding documents
  bench NAME|all [--checkpoint CKPT]  speed and memory against peers, as ratios of one run
  report DIR... --out FILE            one HTML page of one or several runs

presets: {presets}
`new-llm COMMAND --help` lists every option; `new-llm --version` prints the version.
"""


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Return the options of a command.

    Raises:
        ConfigError: an option or value is unknown, missing or out of range.
        SystemExit: help was asked for and printed.
    """
    command = COMMANDS[name]
    rest = list(arguments)
    default: Any = tyro.MISSING
    if command.takes_preset:
        rest, chosen = _take_preset(rest)
        default = RunOptions(out=tyro.MISSING, config=preset(chosen))  # pyright: ignore
    aliases = _RUN_ALIASES if command.takes_preset else _DATA_ALIASES
    rest = _none_as_python([_expand_alias(argument, aliases) for argument in rest], command.options)
    if "--prompt" in rest[:-1]:
        # whatever stands behind it is the prompt, also where it looks like an option
        place = rest.index("--prompt")
        rest[place : place + 2] = [f"--prompt={rest[place + 1]}"]
    return _parse_options(command.options, rest, default, f"new-llm {name}")


def _none_as_python(arguments: list[str], cls: type) -> list[str]:
    """Return arguments in which what may be left open says `None`, as tyro reads it."""
    kinds = {f"--{name}": hint for name, hint in _hints(cls)}

    def open_(option: str) -> bool:
        return type(None) in get_args(kinds.get(option.replace("_", "-")))

    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if argument == "none" and open_(before):
            found.append("None")
        elif equals and value == "none" and open_(option):
            found.append(f"{option}=None")
        else:
            found.append(argument)
    return found


def _expand_alias(argument: str, aliases: dict[str, str]) -> str:
    option, equals, value = argument.partition("=")
    return aliases.get(option, option) + equals + value


def _take_preset(arguments: list[str]) -> tuple[list[str], str]:
    """Take the preset out of the arguments: the one word that is no option's value.

    Raises:
        ConfigError: there are several.
    """
    flags = _flags(RunOptions)
    left: list[str] = []
    named: list[str] = []
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before and before not in flags
        if argument.startswith("--preset="):
            named.append(argument.partition("=")[2])
        elif before == "--preset" or not (argument.startswith("-") or is_value):
            named.append(argument)
        elif argument != "--preset" or place + 1 == len(arguments):
            left.append(argument)
    if len(named) > 1:
        raise ConfigError(
            f"one preset expected, got {' and '.join(named)}; name one, and give options by --NAME"
        )
    return left, named[0] if named else "convex"


def _hints(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the long names of options and what they take."""
    for name, noted in get_type_hints(cls, include_extras=True).items():
        extras = getattr(noted, "__metadata__", ())
        hint, option = (get_args(noted)[0] if extras else noted), name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            bare = any(getattr(extra, "name", None) == "" for extra in extras)
            yield from _hints(hint, prefix if bare else f"{prefix}{option}.")  # pyright: ignore[reportArgumentType]
        else:
            yield prefix + option, hint


def _flags(cls: type) -> set[str]:
    """Return the options that take no value."""
    names = [name for name, hint in _hints(cls) if hint is bool]
    return {f"--{no}{name}" for name in names for no in ("", "no-")}


def _parse_options(cls: type[Options], arguments: list[str], default: Any, program: str) -> Options:
    """Parse by tyro; what it draws as a box becomes one error of ours."""
    complaint = io.StringIO()
    keywords = {} if default is tyro.MISSING else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=arguments, prog=program, **keywords)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(reword(complaint.getvalue(), program)) from None


def reword(box: str, program: str) -> str:
    r"""Return tyro's boxed complaint as one line.

    >>> reword("╭─ Value error ─╮\n│ no such thing │\n│ ───── │\n│ more │\n╰──╯", "new-llm run")
    'no such thing; see new-llm run --help'
    """
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("─-╭╮╰╯ ")]
    # where the terminal has no such characters, the title is a line of its own above a rule
    if rules and rules[0] == 1:
        lines = lines[2:]
    lines = [line for line in lines if line and line[0] not in "╭╰"]
    is_rule = [not line.strip("─-") for line in lines]
    first = lines[: is_rule.index(True) if True in is_rule else len(lines)]
    text = re.sub(r" ?Got errors:.*", "", " ".join(first))
    if "Missing from" in text or "Required" in text:
        names = re.findall(r"--[a-z][\w.-]*|CKPT|NAME\|all|DIR\.\.\.", " ".join(first))
        missing = ", ".join(names)
        text = f"{program} needs {missing}"
    meant = re.findall(r"^--[\w.-]+", "\n".join(lines[len(first) :]), flags=re.MULTILINE)
    given = re.search(r"--[\w.-]+", text)
    if "Unrecognized" in text and meant and given:
        closest = difflib.get_close_matches(given[0], meant, n=1, cutoff=0.0)
        text += f"; perhaps {closest[0]} was meant"
    return f"{text.rstrip('.')}; see {program} --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2, 3 or 130."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that has not all characters gets what it has
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # what is no text is said where it is read, and the rest is kept
        sys.stdin.reconfigure(errors="surrogateescape")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format(presets=", ".join(PRESETS)))
        return 0
    if arguments[0] == "--version":
        from . import __version__

        print(f"new-llm {__version__}")
        return 0
    try:
        return _call(arguments[0], arguments[1:])
    except BrokenPipeError:
        # whoever read the output has seen enough
        discard_output()
        return 0


def _call(name: str, arguments: Sequence[str]) -> int:
    command, options = COMMANDS.get(name), None
    try:
        if command is None:
            raise ConfigError(f"a command is one of {', '.join(COMMANDS)}; got {name!r}")
        options = parse(name, arguments)
        command.call(options)
        sys.stdout.flush()
    except SystemExit as stop:
        return int(stop.code or 0)
    except NewLLMError as error:
        # a setting is wrong for all processes of a run, and one of them says it
        found_by_all = isinstance(error, ConfigError)
        if not error.said and (is_main_process() or not found_by_all):
            print(f"new-llm: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        then = "nothing was written" if command is None else command.left
        if command is not None and options is not None and command.resumes(options):
            then = "the same command goes on from here"
        if is_main_process():
            print(f"new-llm: interrupted; {then}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        from .files import FULL

        if error.errno in FULL:
            print("new-llm: the disk is full; free some space and repeat", file=sys.stderr)
            return DiskFullError.exit_code
        if error.filename is None:
            raise
        print(
            f"new-llm: {error.filename} cannot be used ({error.strerror}); "
            "check its name and permissions",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    return 0
