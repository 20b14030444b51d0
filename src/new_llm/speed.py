"""Benchmarks of speed and memory. Every figure that counts is a ratio within one run.

What is compared does equal work on equal tensors, is warmed up, and takes turns: the speed of a
shared machine drifts, and whoever comes last must not pay for it. Medians are shown.
"""

import copy
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .baselines import GPT, GPTBlock, GPTStepper, MinGRU
from .cell import ContextCell, ConvexCell, LayerwiseCell, SequentialCell
from .checkpoint import load_checkpoint
from .config import SolverConfig, preset, scaled
from .console import Console
from .data import TokenStore
from .dialogues import ReadReport, read_dialogues
from .errors import ConfigError, DataError
from .evaluate import evaluate
from .fixed_point import PART_TOKENS
from .model import NewLLM, num_parameters, solve_tokens
from .phase1 import train
from .recurrence import Engine, carry
from .scan import scan, scan_by_steps
from .stepper import Stepper

WIDTH = 256
LENGTHS = (64, 512, 2048, 16384)
BATCHES = (1, 8, 64)
# a case that would take longer is left out, and its row says so
_LONGEST_SECONDS = 60.0
_REPEATS = 5
_SHORTEST_TEXT, _LONGEST_TEXT = 1000, 1_000_000

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a benchmark is given."""

    console: Console
    device: str
    checkpoint: Path | None = None
    """A trained model; without one, random weights stand in where that is enough."""
    data: str | None = None
    """Dialogues, for long real texts; None is the default package."""
    lengths: tuple[int, ...] = LENGTHS
    batches: tuple[int, ...] = BATCHES
    width: int = WIDTH
    tokens: int | None = None
    """Tokens of the longest text; None is what the benchmark is meant for."""
    threads: int | None = None
    """Threads of PyTorch; None leaves them as they are."""
    num_workers: int | None = None
    """Processes that train side by side."""
    out: Path | None = None
    """Folder that keeps what is finished."""
    kept: dict[str, Any] = field(default_factory=dict)


def interleaved(
    cases: Mapping[str, Callable[[], object]], *, repeats: int = _REPEATS, device: str = "cpu"
) -> dict[str, float]:
    """Return the median seconds of functions that take turns, after one call of each.

    >>> list(interleaved({"nothing": lambda: None}, repeats=2))
    ['nothing']
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, function in cases.items():
            _wait(device)
            begun = time.perf_counter()
            function()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_cell(name: str, width: int) -> ContextCell:
    """Return a cell of one layer or two, as our presets draw it."""
    if name == "convex":
        return ConvexCell(width, width, width)
    make = SequentialCell if name == "sequential" else LayerwiseCell
    return make(width, width, width, num_layers=2, initialisation="orthogonal")


def _plain_loop(cell: ContextCell, x: Tensor, context: Tensor) -> Tensor:
    """Carry a context as one writes it down: a call of the cell a position."""
    contexts = []
    for part in x.unbind(dim=1):
        context = cell(context, part)
        contexts.append(context)
    return torch.stack(contexts, dim=1)


def _hoisted_loop(cell: ContextCell, x: Tensor, context: Tensor) -> Tensor:
    return scan_by_steps(cell, cell.project(x), cell.weights(), context)


def _peers(width: int, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return maps of `[B, T, C]`: ours, the same cells by plain loops, and others."""
    peers: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in ("convex", "sequential", "layerwise"):
        cell = make_cell(name, width).to(device)
        ways: dict[str, Any] = {"scan": scan, "loop": _plain_loop, "hoisted loop": _hoisted_loop}
        if cell.separates_gate:
            ways["gate-scan"] = lambda cell, x, zero: (
                carry(cell, x, zero, engine="gate-scan").contexts
            )
        for way, run in ways.items():
            peers[f"{name}, {way}"] = lambda x, run=run, cell=cell: run(
                cell, x, x.new_zeros(len(x), width)
            )
    for name, kind in (("LSTM", nn.LSTM), ("GRU", nn.GRU)):
        layer = kind(width, width, batch_first=True).to(device)
        peers[name] = lambda x, layer=layer: layer(x)[0]
    peers["minGRU"] = MinGRU(width).to(device)
    peers["GPT block"] = GPTBlock(width).to(device)
    return peers


def recurrence(bench: Bench) -> Rows:
    """Forward, and forward with backward, of one layer: ours, the same by loops, and peers."""
    rows: Rows = []
    expected: dict[str, float] = {}
    sizes = sorted(((b, t) for b in bench.batches for t in bench.lengths), key=math.prod)
    with bench.console.track("recurrence", len(sizes)) as advance:
        for batch, length in sizes:
            x = torch.randn(batch, length, bench.width, device=bench.device)
            peers = _peers(bench.width, bench.device)
            too_long = {
                name
                for name in peers
                # per position of the size before; attention grows with the square
                if expected.get(name, 0.0) * batch * length > _LONGEST_SECONDS
            }
            cases = {name: partial(_train_once, run, x) for name, run in peers.items()
                     if name not in too_long}  # fmt: skip
            both = interleaved(cases, repeats=_repeats(batch * length), device=bench.device)
            forward = interleaved(
                {name: partial(_run_once, peers[name], x) for name in cases},
                repeats=_repeats(batch * length),
                device=bench.device,
            )
            for name in peers:
                if name in both:
                    expected[name] = both[name] / (batch * length)
                row = {"layer": name, "B": batch, "T": length, "forward_s": forward.get(name),
                       "both_s": both.get(name)}  # fmt: skip
                for peer in ("LSTM", f"{name.split(',')[0]}, loop"):
                    known = name in both and peer in both
                    row[f"times_{peer.split(', ')[-1]}"] = (
                        both[peer] / both[name] if known else None
                    )
                rows.append(row)
            advance(1, f"B={batch} T={length}")
    return rows


def _repeats(positions: int) -> int:
    return 5 if positions <= 16384 else 3 if positions <= 131072 else 1


def _train_once(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x.requires_grad_()).square().mean().backward()
    x.grad = None


@torch.no_grad()
def _run_once(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    run(x)


def engines(bench: Bench) -> Rows:
    """Scan against gate-scan on this machine, where they cross, and what `auto` picks."""
    model = _model(bench)
    cell = model.cells()[0]
    rows: Rows = []
    batches = (1, 2, 4, 8, 16, 64) if bench.batches == BATCHES else bench.batches
    for batch in batches:
        for length in bench.lengths:
            if batch * length > 262_144:
                continue
            ids = _some_ids(model, batch, length)
            with torch.no_grad():
                x = model.stages()[0].norm(model.embed(ids))
                choice = model.choose_engines(ids)[0]
            zero = x.new_zeros(batch, cell.context_width)
            ways = {
                "scan": partial(_carried, cell, zero, "scan"),
                "gate-scan": partial(_carried, cell, zero, "gate-scan"),
            }
            repeats = _repeats(batch * length)
            forward = interleaved(
                {name: partial(_run_once, run, x) for name, run in ways.items()},
                repeats=repeats,
                device=bench.device,
            )
            both = interleaved(
                {name: partial(_train_once, run, x) for name, run in ways.items()},
                repeats=repeats,
                device=bench.device,
            )
            with torch.no_grad():
                swept = carry(cell, x, zero, engine="gate-scan").sweeps
            rows.append(
                {
                    "B": batch, "T": length, "sweeps": swept.num_sweeps,
                    "gate-scan, times scan, forward": forward["scan"] / forward["gate-scan"],
                    "gate-scan, times scan, both": both["scan"] / both["gate-scan"],
                    "auto": choice.engine,
                    "auto over the better": forward[choice.engine] / min(forward.values()),
                    "why": choice.why,
                }
            )  # fmt: skip
    return rows


def _carried(cell: ContextCell, initial: Tensor, engine: Engine, x: Tensor) -> Tensor:
    return carry(cell, x, initial, engine=engine).contexts


def sweeps(bench: Bench) -> Rows:
    """Sweeps of gate-scan for a relative error of 1e-5, on real dialogues joined without reset."""
    model = _model(bench)
    lengths = bench.lengths
    if lengths == LENGTHS:
        # weights as they are drawn show less of a very long text
        lengths = (64, 256, 1024, 4096, 16384, *((65536,) if bench.checkpoint else ()))
    text = _long_text(bench, model, max(lengths))
    rows: Rows = []
    for length in lengths:
        with torch.no_grad():
            engines: list[Engine] = ["gate-scan"] * len(model.stages())
            zeros, ids = model.initial_context(1), text[None, :length]
            apart = model.audit(ids, zeros, model(ids, zeros, engines=engines).carried)
        h = model.embed(text[None, :length])
        for k, block in enumerate(model.stages()):
            with torch.no_grad():
                x = block.norm(h)
                zero = x.new_zeros(1, model.config.context_width)
                found = carry(block.cell, x, zero, engine="gate-scan", chunk=length)
                chunked = carry(block.cell, x, zero, engine="gate-scan")
                exact = scan(block.cell, x, zero)
                h = block.read(h, exact)
            rows.append(
                {
                    "T": length, "block": k + 1,
                    "sweeps": found.sweeps.num_sweeps, "error": _error(found.contexts, exact),
                    "estimate": found.sweeps.distance, "rate": found.sweeps.rate,
                    "fallbacks": sum(found.sweeps.fallbacks.values()),
                    "sweeps, in chunks": chunked.sweeps.num_sweeps,
                    "error, in chunks": _error(chunked.contexts, exact),
                    "fallbacks, in chunks": sum(chunked.sweeps.fallbacks.values()),
                    "work, in chunks": chunked.sweeps.work / length,
                    "stack, audited": apart,
                }
            )  # fmt: skip
    return rows


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of any position."""
    return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def token_scope(bench: Bench) -> Rows:
    """Fixed points of GPT-2's 50,257 ids to an error of 1e-5, ours and `torchdeq`'s solvers.

    Ours is told the distance that is asked for. The others get the loosest tolerance of a few that
    reaches it on a sample of the ids, and the ids in the same parts as ours, which stay in the
    caches. What takes longer than `_ONCE_SECONDS` is timed once. Ids that do not come to rest in
    float64 have no fixed point to be near: they are left out of the error and counted.
    """
    try:
        from torchdeq import get_deq  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "bench token-scope compares with torchdeq, which is not installed; "
            'pip install "new-llm[bench]"'
        ) from error
    rows: Rows = []
    part = PART_TOKENS["cpu"]
    for name in ("convex", "sequential", "layerwise"):
        model = _cured(name, bench)
        cell = model.cells()[0]
        x = model.stages()[0].norm(model.embed(torch.arange(model.vocab_size))).detach()
        projected, weights = cell.project(x), cell.weights()
        exact, settled = _exact(cell, x)

        def ours(ids: Tensor, tolerance: float, cell: Any = cell, x: Any = x) -> Tensor:
            solver = SolverConfig(
                tolerance=tolerance, max_iterations=_MAX_ITERATIONS, distance=_ASKED_ERROR
            )
            zero = x.new_zeros(len(ids), cell.context_width)
            return solve_tokens(cell, x[ids], zero, solver).context

        def theirs(
            ids: Tensor, tolerance: float, kind: str, cell: Any = cell, p: Any = projected,
            weights: Any = weights,
        ) -> Tensor:  # fmt: skip
            deq = get_deq(
                f_solver=kind, f_max_iter=_MAX_ITERATIONS, f_tol=tolerance, f_stop_mode="rel"
            )
            found = []
            for some in ids.split(part):
                zero = p.new_zeros(len(some), cell.context_width)
                found.append(deq(lambda c, q=p[some]: cell.update(c, q, weights), zero)[0][-1])
            return torch.cat(found)

        ways: dict[str, Callable[[Tensor, float], Tensor]] = {
            "ours": ours,
            "torchdeq, plain iteration": partial(theirs, kind="fixed_point_iter"),
            "torchdeq, Anderson": partial(theirs, kind="anderson"),
        }
        found: dict[str, dict[str, Any]] = {
            way: _reach(run, exact, settled, _TOLERANCES if way != "ours" else _OWN_TOLERANCE)
            for way, run in ways.items()
        }
        timed = interleaved(
            {
                way: partial(_searched, ways[way], torch.arange(len(x)), one["tolerance"])
                for way, one in found.items()
                if one["ids"] == len(x) and one["seconds"] <= _ONCE_SECONDS
            },
            repeats=3,
        )
        for way, one in found.items():
            one["seconds"] = timed.get(way, one["seconds"])
            ratio = one["seconds"] / found["ours"]["seconds"]
            rows.append({"cell": name, "solver": way, **one, "times_ours": ratio,
                         "ids without rest": int((~settled).sum())})  # fmt: skip
    return rows


_ASKED_ERROR = 1e-5
_GPT2_IDS = 50257
_MAX_ITERATIONS = 10_000
_SAMPLE = 256
# not tighter: the change of a context at rest in float32 is 3e-7 of its length
_TOLERANCES = (1e-5, 3e-6, 1e-6, 7e-7, 5e-7)
# the distance decides; this is where single precision hands over
_OWN_TOLERANCE = (1e-6,)
_ONCE_SECONDS = 20.0


@torch.no_grad()
def _searched(run: Callable[[Tensor, float], Tensor], ids: Tensor, tolerance: float) -> Tensor:
    return run(ids, tolerance)


def _reach(
    run: Callable[[Tensor, float], Tensor],
    exact: Tensor,
    settled: Tensor,
    tolerances: tuple[float, ...],
) -> dict[str, Any]:
    """Return the loosest tolerance of a few that reaches the error asked for, and what it takes.

    It is looked for on a sample of the ids. Where none is enough, or all ids would take longer than
    `_LONGEST_SECONDS`, the seconds are those of the sample, scaled.
    """

    def attempt(ids: Tensor, tolerance: float) -> dict[str, Any]:
        begun = time.perf_counter()
        found = _searched(run, ids, tolerance)
        seconds = (time.perf_counter() - begun) * len(exact) / len(ids)
        error = _error(found[settled[ids]], exact[ids][settled[ids]])
        return {"tolerance": tolerance, "error": error, "reached": error <= _ASKED_ERROR,
                "ids": len(ids), "seconds": seconds}  # fmt: skip

    sample = torch.arange(0, len(exact), max(1, len(exact) // _SAMPLE))
    attempt(sample[:1], 1.0)  # warm-up
    found = attempt(sample, tolerances[0])
    for tolerance in tolerances[1:]:
        before = found
        if not found["reached"]:
            found = attempt(sample, tolerance)
        if found["error"] >= before["error"]:  # it ran to its cap, or to the end of float32
            break
    if not found["reached"] or found["seconds"] > _LONGEST_SECONDS:
        return found
    for tolerance in tolerances[tolerances.index(found["tolerance"]) :]:
        found = attempt(torch.arange(len(exact)), tolerance)
        if found["reached"] or found["seconds"] > _LONGEST_SECONDS:
            break
    return found


def _exact(cell: ContextCell, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return fixed points in float64, and which came to rest: nothing changes that counts."""
    wide = copy.deepcopy(cell).double()
    zero = x.new_zeros(len(x), cell.context_width, dtype=torch.float64)
    found = solve_tokens(wide, x.double(), zero, SolverConfig(tolerance=1e-12, max_iterations=5000))
    return found.context, found.converged


def generation(bench: Bench) -> Rows:
    """Greedy text at batch 1 after 2,048 tokens: ours, GPT-2 in transformers, our own GPT."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = _model(bench)
    length, width, vocab = 2048, model.config.embedding_width, model.vocab_size
    total = num_parameters(model)
    positions = length + 512
    fixed = vocab * width + 2 * width
    # the MLPs take what is left, so that all have equally many parameters
    per_block = 4 * width * width + 9 * width
    inner = {
        name: max(1, round(((total - fixed - extra) / 2 - per_block) / (2 * width + 1)))
        for name, extra in (("theirs", positions * width), ("own", 0))
    }
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=2, n_head=4,
            n_inner=inner["theirs"], use_cache=True, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    own = GPT(vocab, width, num_blocks=2, mlp_width=inner["own"]).eval()
    count = 32
    makers = {
        "ours": partial(_our_tokens, model),
        "GPT-2, transformers": partial(_gpt2_tokens, theirs, length),
        "own GPT, tight loop": partial(_own_gpt_tokens, own, length),
    }
    streams = {name: make() for name, make in makers.items()}
    for name, stream in streams.items():
        _take(stream, length if name == "ours" else 16)
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(10):
        for name, stream in streams.items():
            begun = time.perf_counter()
            _take(stream, count)
            times[name].append((time.perf_counter() - begun) / count)
    parameters = {"ours": total, "GPT-2, transformers": num_parameters(theirs),
                  "own GPT, tight loop": num_parameters(own)}  # fmt: skip
    median = {name: statistics.median(found) for name, found in times.items()}
    return [
        {
            "model": name, "parameters": parameters[name], "vocabulary": vocab, "after": length,
            "tokens_per_s": 1.0 / seconds, "times slower than ours": seconds / median["ours"],
        }
        for name, seconds in median.items()
    ]  # fmt: skip


def _take(stream: Iterator[int], count: int) -> None:
    for _ in range(count):
        next(stream)


def _our_tokens(model: NewLLM) -> Iterator[int]:
    step, context, token = Stepper(model), model.initial_context(1), 1
    while True:
        token = int(step(token, context).argmax())
        yield token


@torch.inference_mode()
def _gpt2_tokens(model: Any, length: int) -> Iterator[int]:
    """Yield tokens as `generate` draws them greedily, after a prompt of a length."""
    ids = torch.randint(model.config.vocab_size, (1, length))
    found = model(ids, use_cache=True)
    while True:
        token = found.logits[:, -1:].argmax(dim=-1)
        found = model(token, cache=found.past_key_values, use_cache=True)
        yield int(token)


def _own_gpt_tokens(model: GPT, length: int) -> Iterator[int]:
    step, token = GPTStepper(model, length + 512), 1
    for _ in range(length):
        step(token)
    while True:
        token = int(step(token).argmax())
        yield token


def flatness(bench: Bench) -> Rows:
    """Time a token of one text from its first to its last, beside a text that begins anew."""
    model = _model(bench)
    step, context, token = Stepper(model), model.initial_context(1), 1
    fresh = model.initial_context(1)
    size, rows = 200, []
    longest = bench.tokens or _LONGEST_TEXT
    marks = [10**k for k in range(3, 12) if 10**k < longest] + [longest]
    done = 0
    with bench.console.track("flatness", longest) as advance:
        for mark in marks:
            while done < mark - 25 * size:
                token = int(step(token, context).argmax())
                done += 1
                if done % 1000 == 0:
                    advance(1000)
            old, new = [], []
            while done < mark:
                begun = time.perf_counter()
                for _ in range(size):
                    token = int(step(token, context).argmax())
                old.append(time.perf_counter() - begun)
                done += size
                other = 1
                begun = time.perf_counter()
                for _ in range(size):
                    other = int(step(other, fresh).argmax())
                new.append(time.perf_counter() - begun)
                fresh.zero_()
            ratios = [a / b for a, b in zip(old, new, strict=True)] or [math.nan]
            rows.append(
                {
                    "tokens": done, "us_a_token": 1e6 * statistics.median(old or [math.nan]) / size,
                    "times a new text": statistics.median(ratios),
                    "context_bytes": context.numel() * context.element_size(),
                    "peak_mib": _peak_mib(),
                }
            )  # fmt: skip
    return rows


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def document(bench: Bench) -> Rows:
    """Evaluate one document of a million tokens: memory beside that of a tenth of it."""
    rows: Rows = []
    longest = bench.tokens or _LONGEST_TEXT
    for tokens in (longest // 10, longest):
        found = _apart(_evaluate_document, bench, tokens)
        rows.append({"tokens": tokens, **found})
    rows[-1]["peak over a tenth"] = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    return rows


def _evaluate_document(bench: Bench, tokens: int) -> dict[str, Any]:
    model = _model(bench)
    text = _long_text(bench, model, tokens).cpu().numpy().astype(np.int32)
    store = TokenStore(
        tokens=text,
        assistant=np.ones(len(text), dtype=bool),
        offsets=np.array([0, len(text)], dtype=np.int64),
        num_content_bytes=np.array([len(text)], dtype=np.int64),
        fingerprint="",
    )
    before = _peak_mib()
    begun = time.perf_counter()
    result = evaluate(model, store)
    seconds = time.perf_counter() - begun
    return {"loss": result.loss, "tokens_per_s": len(text) / seconds, "peak_mib": _peak_mib(),
            "grown_mib": _peak_mib() - before}  # fmt: skip


def memory(bench: Bench) -> Rows:
    """Peak memory of one training step over the length of a text, ours and a GPT block's."""
    rows: Rows = []
    lengths = (1024, 2048, 4096, 8192, 16384) if bench.lengths == LENGTHS else bench.lengths
    for length in lengths:
        row: dict[str, Any] = {"T": length, "B": 1}
        for name in ("convex, scan", "convex, gate-scan", "layerwise, scan", "GPT block", "LSTM"):
            row[name] = _apart(_train_memory, bench, (name, length))["grown_mib"]
        ours = row["convex, scan"]
        row["GPT block, times scan"] = row["GPT block"] / ours if ours else None
        rows.append(row)
    return rows


def _train_memory(bench: Bench, case: tuple[str, int]) -> dict[str, Any]:
    name, length = case
    run = _peers(bench.width, bench.device)[name]
    _train_once(run, torch.randn(1, 64, bench.width, device=bench.device))
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train_once(run, torch.randn(1, length, bench.width, device=bench.device))
        return {"grown_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    before = _peak_mib()
    _train_once(run, torch.randn(1, length, bench.width))
    return {"grown_mib": _peak_mib() - before}


def _apart(function: Callable[[Bench, Any], dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what a function gives in a process of its own: peaks of memory never fall."""
    context = multiprocessing.get_context("spawn")
    bench, case = given
    bare = {"device": bench.device, "checkpoint": bench.checkpoint, "data": bench.data,
            "width": bench.width}  # fmt: skip
    with context.Pool(1) as pool:
        return pool.apply(_alone, (function.__name__, bare, case, torch.get_num_threads()))


def _alone(name: str, bare: dict[str, Any], case: Any, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return globals()[name](Bench(console=Console(quiet=True), **bare), case)


def _model(bench: Bench) -> NewLLM:
    """Return the trained model, or the default one as it is drawn."""
    if "model" not in bench.kept:
        if bench.checkpoint is not None:
            loaded = load_checkpoint(bench.checkpoint)
            bench.kept["model"], bench.kept["tokenizer"] = loaded.model, loaded.tokenizer
        else:
            config = preset("convex")
            torch.manual_seed(0)
            shape = scaled(config.model, bench.width)
            bench.kept["model"] = NewLLM(shape, config.data.vocab_size, config.solver)
    return bench.kept["model"].to(bench.device).eval()


def unsuited(name: str, bench: Bench) -> str | None:
    """Return why a benchmark has nothing to measure of what it is given, or None."""
    if name == "flatness" and bench.tokens is not None and bench.tokens < _SHORTEST_TEXT:
        return f"at least {_SHORTEST_TEXT} --tokens expected, got {bench.tokens}; raise them"
    if bench.checkpoint is None or name not in ("engines", "sweeps", "generation", "flatness"):
        return None
    shape, why = _model(bench).config, None
    if shape.scope == "token":
        why = "a model that carries its context expected (scope sequence), got one of token scope"
    elif name in ("engines", "sweeps") and not _model(bench).cells()[0].separates_gate:
        why = f"a cell with a separate gate expected, {shape.cell} has none"
    elif name == "generation" and shape.embedding_width % 8:
        why = (
            "an embedding width expected that is a multiple of 8, which the peers' heads share, "
            f"got {shape.embedding_width}"
        )
    return None if why is None else f"{why}; give another --checkpoint"


def _some_ids(model: NewLLM, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (batch, length), generator=generator)
    return ids.to(model.embedding.weight.device)


def _long_text(bench: Bench, model: NewLLM, length: int) -> Tensor:
    """Return real dialogues as one text, begun again where they end; random ids without a model."""
    if "tokenizer" not in bench.kept:
        return _some_ids(model, 1, length)[0]
    report = ReadReport()
    rows = read_dialogues(
        bench.data or "chitchat-dataset",
        split="train_sft",
        on_bad_row="skip",
        max_dialogues=4000,
        report=report,
    )
    parts = [torch.from_numpy(ids).long()
             for ids, _ in bench.kept["tokenizer"].encode_dialogues(list(rows))]  # fmt: skip
    if report.left_out is not None:
        bench.console.show(report.left_out)
    if not parts:
        raise DataError(f"dialogues expected, got none from {bench.data}; give others to --data")
    text = torch.cat(parts)
    times = math.ceil(length / len(text))
    return text.repeat(times)[:length].to(bench.device)


def _widths(width: int) -> dict[str, Any]:
    return dict.fromkeys(("context_width", "embedding_width", "hidden_width"), width)


def _cured(name: str, bench: Bench) -> NewLLM:
    """Return a model whose cell Phase 1 trained, with GPT-2's vocabulary."""
    own = preset("convex" if name == "convex" else "layerwise")
    layers = 1 if name == "convex" else 2
    torch.manual_seed(0)
    shape = replace(
        own.model, cell=name, num_blocks=1, num_layers=layers, mlp_width=0, **_widths(bench.width)
    )
    vocab_size = min(_GPT2_IDS, bench.tokens or _GPT2_IDS)
    model = NewLLM(shape, vocab_size)
    ids = torch.arange(0, vocab_size, 4)
    train(model, ids, [], own.phase1, seed=0, console=bench.console, log=lambda row: None)
    return model.eval()
