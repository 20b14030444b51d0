"""Quality against peers: the same dialogues, tokens, optimiser and evaluation for every model.

A trial trains one model and scores it. Trials run side by side in processes of one thread and are
kept, each with its exact config, in a folder from which tables are made again without training.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache import ContextCache, write_sequence_cache, write_token_cache
from .checkpoint import save_checkpoint
from .config import (
    ModelConfig,
    PeerConfig,
    Phase1Config,
    Phase2Config,
    fingerprint,
    from_dict,
    preset,
    scaled,
    to_dict,
)
from .console import Console
from .counts import KneserNey
from .data import TokenStore, dialogue_hash, held_out_ids, is_held_out, write_store
from .dialogues import DEFAULT_SOURCE, Messages, ReadReport, read_dialogues
from .errors import CheckpointError, DataError, NonFiniteError
from .evaluate import (
    evaluate,
    ratio_interval,
    rebuilt_gains,
    sequence_verdict,
    token_verdict,
)
from .files import read_object, sha256, understood, write_json
from .model import LanguageModel, NewLLM, num_parameters
from .peers import Peer
from .phase1 import train as train_phase1
from .phase2 import Phase2Data, Phase2Result
from .phase2 import train as train_phase2
from .resume import Keeper
from .runner import Numbers, Runner
from .tokenizer import ChatTokenizer

# ours first, then what it is compared with
PEERS = ("lstm", "gru", "mingru", "gpt", "mamba")
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
# those whose own matrices grow with the square of what they carry: three quarters of that width,
# and a wider MLP for it, are tried too, as ours were
_NARROWED = ("lstm", "gru", "mingru")
VOCAB_SIZE = 4096
# two LSTM layers of 256, norms, read-outs and 4,096 embeddings: they leave no room for an MLP
PARAMETERS = 2_235_392
# a minute of evaluation
PAST_POSITIONS = 4000
# about an hour on two cores
LONG_TOKENS = 14_000_000
_HELD_OUT_SHARE = 0.05
# steps of one turn of a timing, those before it, in which what is carried grows, and turns
_PACED_STEPS, _PACED_AFTER, _PACED_TURNS = 16, 4, 5
# of which MLPs have a multiple when steps are timed: products of odd widths take up to a tenth more
_EVEN_WIDTH = 16
# words of Kneser-Ney's n-grams
_ORDERS = {2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Dialogues of one source or two, mixed to train on, held out apart."""

    folder: Path
    train: TokenStore
    held_out: dict[str, TokenStore]
    """By the name of the source."""
    vocab_size: int
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """Open what `prepare_corpus` wrote."""
        record = read_object(folder / "corpus.json", "a corpus")
        with understood(folder / "corpus.json", "a corpus"):
            return cls(
                folder=folder,
                train=TokenStore.open(folder / "train"),
                held_out={name: TokenStore.open(folder / name) for name in record["held_out"]},
                vocab_size=record["vocab_size"],
                fingerprint=record["fingerprint"],
            )

    def tokenizer(self) -> ChatTokenizer:
        """Return the tokenizer that made its tokens."""
        return ChatTokenizer.load(self.folder / "tokenizer")


def prepare_corpus(
    folder: Path,
    data: Path | None,
    *,
    vocab_size: int = VOCAB_SIZE,
    max_dialogues: int | None = None,
) -> Corpus:
    """Tokenise the default chats, and `train.jsonl` and `valid.jsonl` of a folder, once.

    A twentieth of the chats is held out by hash. The vocabulary is that of the training part.

    Args:
        folder: where it is kept.
        data: a folder with both files; None is the chats alone.
        vocab_size: of the BPE.
        max_dialogues: of each source.

    Raises:
        DataError: dialogues cannot be read.
        CheckpointError: `folder` holds a corpus of other sources.
    """
    # a part is kept by its name: `.` and `..` would lead out of the folder
    name = "" if data is None else data.name if data.name not in ("", "..") else data.resolve().name
    if data is not None and name in ("", "chats", "tokenizer", "train"):
        raise DataError(
            f"a folder of dialogues expected whose name is not one of a corpus's own parts, got "
            f"{str(data)!r}; rename it"
        )
    # two folders may have one name
    files = [] if data is None else [data / "train.jsonl", data / "valid.jsonl"]
    asked = {"data": None if data is None else name, "vocab_size": vocab_size,
             "max_dialogues": max_dialogues,
             "sha256": [sha256(path) for path in files if path.is_file()]}  # fmt: skip
    done = folder / "corpus.json"
    if done.exists():
        record = read_object(done, "a corpus")
        if record.get("asked") != asked:
            raise CheckpointError(
                f"a corpus of the same dialogues, vocabulary size and number expected in {folder}, "
                "it holds another; use a new --out"
            )
        return Corpus.open(folder)

    def read(source: str) -> Iterator[Messages]:
        return read_dialogues(
            source, split="train_sft", on_bad_row="error", max_dialogues=max_dialogues,
            report=ReadReport(),
        )  # fmt: skip

    parts = {"chats": [m for m in read(DEFAULT_SOURCE) if is_held_out(m, _HELD_OUT_SHARE)]}
    if data is not None:
        parts[name] = list(read(str(data / "valid.jsonl")))
    known = {dialogue_hash(messages) for part in parts.values() for messages in part}

    def training() -> Iterator[Messages]:
        sources = [DEFAULT_SOURCE] + ([] if data is None else [str(data / "train.jsonl")])
        for messages in chain.from_iterable(map(read, sources)):
            if dialogue_hash(messages) not in known:
                yield messages

    texts = (message["content"] for messages in training() for message in messages)
    tokenizer = ChatTokenizer.train(texts, vocab_size)
    tokenizer.save(folder / "tokenizer")
    stores = {
        name: write_store(folder / name, iter(part), tokenizer) for name, part in parts.items()
    }
    train = write_store(folder / "train", training(), tokenizer)
    write_json(
        done,
        {
            "asked": asked,
            "held_out": list(stores),
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": fingerprint(
                [train.fingerprint, *(s.fingerprint for s in stores.values())]
            ),
        },
    )
    return Corpus.open(folder)


@contextmanager
def opened(
    out: Path, data: Path | None, *, console: Console, num_workers: int | None
) -> Iterator[tuple[Corpus, Runner]]:
    """Yield the corpus of a folder of results, and what runs and keeps its trials."""
    corpus = prepare_corpus(out / "corpus", data)
    with Runner(
        console=console, folder=out / "trials", basis=corpus.fingerprint, num_workers=num_workers
    ) as runner:
        yield corpus, runner


def build(model: Numbers, vocab_size: int) -> LanguageModel:
    """Return a new model of a shape, ours or a peer's.

    >>> build({"kind": "gru", "embedding_width": 8, "width": 8, "mlp_width": 0}, 50).vocab_size
    50
    """
    if "cell" in model:
        return NewLLM(from_dict(ModelConfig, model), vocab_size)
    return Peer(from_dict(PeerConfig, model), vocab_size)


def matched(model: Numbers, wanted: int, vocab_size: int) -> Numbers:
    """Return a shape whose MLPs are as wide as makes its parameters equal to `wanted`.

    >>> shape = {"kind": "gru", "embedding_width": 8, "width": 8, "mlp_width": 0}
    >>> matched(shape, 5000, 50)["mlp_width"]
    73
    """
    with torch.device("meta"):
        narrow, wide = (
            num_parameters(build(model | {"mlp_width": width}, vocab_size)) for width in (1, 2)
        )
    # without an MLP its norm and biases are gone too, which the line through both leaves out
    width = 1 + round((wanted - narrow) / (wide - narrow))
    return model | {"mlp_width": max(width, 0)}


def filled(model: Numbers, vocab_size: int) -> Numbers:
    """Return a shape whose MLPs have got the weights that no coupling leaves idle."""
    with torch.device("meta"):
        made = build(model, vocab_size)
    idle = sum(
        parameter.numel()
        for name, parameter in made.named_parameters()
        if "from_context" in name or "to_share" in name
    )
    return matched(model, num_parameters(made) + idle, vocab_size)


def trained(
    *,
    model: Numbers,
    phase1: Numbers | None,
    phase2: Numbers,
    sequence_length: int,
    seed: int,
    folder: str,
    past_positions: int = 0,
    threads: int = 1,
    device: str = "cpu",
    kept: str | None = None,
    checkpoint: str | None = None,
) -> Numbers:
    """Train a model and score it on every held-out part.

    Args:
        model: fields of `ModelConfig` or `PeerConfig`.
        phase1: fields of `Phase1Config`; None goes without.
        phase2: fields of `Phase2Config`.
        sequence_length: tokens of a segment.
        seed: of weights, order and draws.
        folder: of the corpus.
        past_positions: at which it is measured what the past is worth; 0 leaves that out.
        threads: of PyTorch; more than one is for a trial that runs alone.
        device: of PyTorch; products are of float32 on all.
        kept: folder of an unfinished training, which goes on there; Phase 1 is done again.
        checkpoint: where the model is saved in the end.
    """
    torch.set_num_threads(threads)
    corpus = Corpus.open(Path(folder))
    torch.manual_seed(seed)
    # cuDNN would take the products of LSTM and GRU in a narrower format
    torch.backends.cudnn.allow_tf32 = False
    # the same weights on every device
    made = build(model, corpus.vocab_size).to(device)
    first = Phase1Config() if phase1 is None else from_dict(Phase1Config, phase1)
    begun = time.perf_counter()
    if phase1 is not None and isinstance(made, NewLLM):
        _settle(made, corpus, first, seed)
    settled = time.perf_counter()
    torch.manual_seed(seed + 1)
    second = from_dict(Phase2Config, phase2)
    with tempfile.TemporaryDirectory(prefix="new-llm-") as place:
        known = _cached(made, corpus, second, Path(place) / "cache")
        cached = time.perf_counter()
        training = Path(kept or place) / "training"
        done = _predict(made, corpus, known, second, first, sequence_length, seed, training)
    made.eval()
    if checkpoint is not None and isinstance(made, NewLLM):
        save_checkpoint(Path(checkpoint), made, corpus.tokenizer())
    total = num_parameters(made)
    return {
        "parameters": total,
        "parameters_inner": total - made.embedding.weight.numel(),
        "tokens_seen": done.tokens_seen,
        "num_steps": done.num_steps,
        "threads": threads,
        "torch": torch.__version__,
        "device": device_name(device),
        "seconds_phase1": settled - begun,
        "seconds_cache": cached - settled,
        "seconds": done.seconds,
        **_scored(made, corpus),
        "rebuilt": _rebuilt(made, corpus, past_positions) if past_positions else None,
        "doctor": _judged(made, corpus) if isinstance(made, NewLLM) else None,
    }


def device_name(device: str) -> str:
    """Return what a device is: instructions of the CPU, or which GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def tried(**given: Any) -> Numbers:
    """Return what `trained` gives, or that its numbers became NaN or infinite."""
    try:
        return trained(**given)
    except NonFiniteError as error:
        return {"diverged": str(error)}


def paced(*, asked: list[Numbers], folder: str) -> Numbers:
    """Return the seconds of Phase 1 and of a training step, for models that take turns.

    A step is what each of some more takes, once what is carried has its full size.

    Args:
        asked: arguments of `trained` for each, without `folder`.
        folder: of the corpus.
    """
    corpus = Corpus.open(Path(folder))
    models = [build(given["model"], corpus.vocab_size) for given in asked]

    def predicted(given: Numbers, model: LanguageModel, steps: int) -> float:
        config = from_dict(Phase2Config, given["phase2"] | {"max_steps": steps, "min_steps": steps})
        with tempfile.TemporaryDirectory(prefix="new-llm-") as place:
            begun = time.perf_counter()
            _predict(
                model, corpus, None, config, Phase1Config(), given["sequence_length"],
                given["seed"], Path(place) / "training",
            )  # fmt: skip
            return time.perf_counter() - begun

    before: list[list[float]] = [[] for _ in asked]
    steps: list[list[float]] = [[] for _ in asked]
    for turn in range(_PACED_TURNS + 1):
        for given, model, first, second in zip(asked, models, before, steps, strict=True):
            fresh = build(given["model"], corpus.vocab_size)
            begun = time.perf_counter()
            if given["phase1"] is not None and isinstance(fresh, NewLLM):
                _settle(fresh, corpus, from_dict(Phase1Config, given["phase1"]), given["seed"])
            settled = time.perf_counter() - begun
            few = predicted(given, model, _PACED_AFTER)
            many = predicted(given, model, _PACED_AFTER + _PACED_STEPS)
            if turn:  # the first one warms up
                first.append(settled)
                second.append((many - few) / _PACED_STEPS)
    return {
        "phase1": [*map(statistics.median, before)],
        "step": [*map(statistics.median, steps)],
        "torch": torch.__version__,
        "device": device_name("cpu"),
    }


def _scored(model: LanguageModel, corpus: Corpus) -> Numbers:
    """Return losses on every held-out part, and the nats of each of its dialogues."""
    scores, nats = {}, {}
    for name, part in corpus.held_out.items():
        each = np.zeros(part.num_dialogues)
        scores[name] = evaluate(model, part, by_dialogue=each).to_dict()
        nats[name] = each.round(3).tolist()
    return {"scores": scores, "nats": nats}


def _rebuilt(model: LanguageModel, corpus: Corpus, num_positions: int) -> dict[str, Numbers]:
    """Return what is gained from all that was said, by part and tokens kept."""
    found = {}
    for name, part in corpus.held_out.items():
        try:
            gained = rebuilt_gains(model, part, num_positions=num_positions)
        except DataError:  # its dialogues are short
            continue
        found[name] = {str(reach): gains for reach, gains in gained.items()}
    return found


def _judged(model: NewLLM, corpus: Corpus) -> Numbers:
    """Return verdicts, and measurements of the recurrence in held-out dialogues."""
    longest = max(corpus.held_out.values(), key=lambda part: np.diff(part.offsets).max())
    token = token_verdict(model)
    if model.config.scope == "token":
        return {"token": token.verdict, "sequence": None, "measurements": {}}
    sequence = sequence_verdict(model, longest, trained=True)
    return {
        "token": token.verdict,
        "sequence": sequence.verdict,
        "measurements": {name: row.value for name, row in sequence.measurements.items()},
    }


def _settle(model: NewLLM, corpus: Corpus, config: Phase1Config, seed: int) -> None:
    counts = corpus.train.token_counts(model.vocab_size)
    held_out = held_out_ids(model.vocab_size, model.config.context_width)
    ids = torch.from_numpy(np.setdiff1d(np.flatnonzero(counts), held_out))
    ids = ids.to(model.embedding.weight.device)
    quiet = Console(quiet=True)
    train_phase1(model, ids, [], config, seed=seed, console=quiet, log=lambda row: None)


def _unseen(amount: float = 1, note: str = "") -> None:
    """Show no progress: trials run in other processes."""


def _cached(
    model: LanguageModel, corpus: Corpus, config: Phase2Config, folder: Path
) -> ContextCache | None:
    """Write the fixed points or contexts that Phase 2 reads instead of computing them."""
    if not isinstance(model, NewLLM):
        return None
    if model.config.scope == "token":
        return write_token_cache(folder, model, _unseen)
    if config.freeze_context:
        return write_sequence_cache(folder, model, corpus.train, _unseen)
    return None


def _predict(
    model: LanguageModel,
    corpus: Corpus,
    known: ContextCache | None,
    config: Phase2Config,
    first: Phase1Config,
    sequence_length: int,
    seed: int,
    folder: Path,
) -> Phase2Result:
    data = Phase2Data(
        train=corpus.train,
        # nothing is evaluated on the way
        valid=next(iter(corpus.held_out.values())),
        segment_length=sequence_length,
        cache=known,
    )
    return train_phase2(
        model,
        data,
        replace(config, evaluations=0),
        seed=seed,
        phase1=first,
        keeper=Keeper(folder, seconds=config.checkpoint_seconds),
        console=Console(quiet=True),
        log=lambda row: None,
    )


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A model of the comparison."""

    name: str
    shapes: tuple[Numbers, ...]
    """Of as many parameters each; tuning leaves one."""
    phase1: Numbers | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The comparison: what is trained, on how many tokens, and where it is kept."""

    console: Console
    out: Path
    data: Path | None = None
    """Folder with `train.jsonl` and `valid.jsonl`, beside the default chats."""
    tokens: int = 4_000_000
    tuning_tokens: int = 2_000_000
    num_seeds: int = 3
    learning_rates: tuple[float, ...] = LEARNING_RATES
    width: int = 256
    parameters: int | None = None
    """Of every model; None is `PARAMETERS`, at another width what the default has there."""
    num_workers: int | None = None
    device: str = "cpu"
    """Where models are trained and scored; what a step takes is measured on the CPU."""

    def run(self) -> list[Numbers]:
        """Train what is not kept yet; return the rows of all tables."""
        with opened(self.out, self.data, console=self.console, num_workers=self.num_workers) as (
            corpus,
            runner,
        ):
            return self._tables(corpus, runner)

    def _tables(self, corpus: Corpus, runner: Runner) -> list[Numbers]:
        entrants, rates, rows = self._tuned(corpus, runner, self._entrants(corpus.vocab_size))
        equal_tokens = {one.name: num_steps(self.tokens) for one in entrants}
        numbers = self._trained(corpus, runner, entrants, rates, equal_tokens)
        paces, timed_on = self._paces(corpus, runner, entrants)
        equal_time = _equal_time(entrants, paces, num_steps(self.tokens))
        timed = self._trained(corpus, runner, entrants, rates, equal_time)
        rows += counted(corpus)
        for one in entrants:
            row = _row("tokens", one, rates[one.name], numbers[one.name], corpus)
            rows.append(row | {"seconds": _needed(paces[one.name], equal_tokens[one.name])})
        for one in entrants:
            row = _row("time", one, rates[one.name], timed[one.name], corpus)
            row |= {"seconds": _needed(paces[one.name], equal_time[one.name]),
                    "a step, ms": 1e3 * paces[one.name][1], "timed on": timed_on}  # fmt: skip
            rows.append(row)
        ours, *peers = (one.name for one in entrants)
        for equal, found in (("tokens", numbers), ("time", timed)):
            for peer in peers:
                for row in _leads(found[peer], found[ours], corpus):
                    rows.append({"table": "leads", "model": peer, "equal": equal} | row)
        for one in entrants:
            rows += _remembered(one.name, numbers[one.name][0].get("rebuilt"))
        return rows

    def _paces(
        self, corpus: Corpus, runner: Runner, entrants: list[Entrant]
    ) -> tuple[dict[str, tuple[float, float]], str]:
        """Return each model's seconds of Phase 1 and of a step, and on what they were taken."""
        # trials share the machine with others: what a step takes is measured apart, in turns
        steps = _PACED_AFTER + _PACED_STEPS
        asked = [self._arguments(_evened(one), self.learning_rates[0], steps, 0)
                 for one in entrants]  # fmt: skip
        (paces,) = runner.run(
            "seconds a step", paced, [{"asked": asked}], places={"folder": str(corpus.folder)}
        )
        both = zip(paces["phase1"], paces["step"], strict=True)
        found = {one.name: pair for one, pair in zip(entrants, both, strict=True)}
        return found, places_of([paces])

    def _entrants(self, vocab_size: int) -> list[Entrant]:
        """Return ours and its peers, all with equally many parameters."""
        config = preset("convex")
        shape = to_dict(scaled(config.model, self.width))
        with torch.device("meta"):
            size = num_parameters(build(shape, vocab_size))
        wanted = self.parameters
        if wanted is None:
            # another vocabulary or width is another size
            wanted = PARAMETERS if abs(size / PARAMETERS - 1.0) < 0.01 else size
        elif wanted != size:
            shape = matched(shape, wanted, vocab_size)
        first = to_dict(config.phase1)
        entrants = [Entrant(name="convex", shapes=(shape,), phase1=first)]
        for kind in PEERS:
            widths = [16 if kind == "mamba" else self.width]
            if kind in _NARROWED:
                widths.append(self.width * 3 // 4)
            bare = [to_dict(PeerConfig(kind=kind, embedding_width=self.width, width=width))
                    for width in widths]  # fmt: skip
            shapes = tuple(matched(each, wanted, vocab_size) for each in bare)
            entrants.append(Entrant(name=kind, shapes=shapes, phase1=None))
        return entrants

    def _arguments(self, one: Entrant, learning_rate: float, steps: int, seed: int) -> Numbers:
        """Return what `trained` is given."""
        config = preset("convex")
        training = replace(
            config.phase2, learning_rate=learning_rate, max_steps=steps, min_steps=steps,
            engine="scan", muon_precision="float32",  # on every CPU the same
        )  # fmt: skip
        if one.phase1 is None:
            training = replace(training, contractive=0.0, contractive_every=1, pair_hinge=0.0)
        return {
            "model": one.shapes[0],
            "phase1": one.phase1,
            "phase2": to_dict(training),
            "sequence_length": config.data.sequence_length,
            "seed": seed,
        }

    def _tuned(
        self, corpus: Corpus, runner: Runner, entrants: list[Entrant]
    ) -> tuple[list[Entrant], dict[str, float], list[Numbers]]:
        """Return each model's best shape and learning rate, and the rows of all."""
        steps = num_steps(self.tuning_tokens)
        asked = [(replace(one, shapes=(shape,)), rate)
                 for one in entrants for shape in one.shapes
                 for rate in self.learning_rates]  # fmt: skip
        found = runner.run(
            "learning rates",
            tried,
            [self._arguments(one, rate, steps, 0) for one, rate in asked],
            places={"folder": str(corpus.folder), "device": self.device},
            unfinished=self.out / "unfinished",
        )  # fmt: skip
        losses = [
            math.inf if "diverged" in numbers else mixed_loss(numbers["scores"])
            for numbers in found
        ]
        # the first of several that are as good
        best = {
            one.name: min(
                (loss, place)
                for place, ((other, _), loss) in enumerate(zip(asked, losses, strict=True))
                if other.name == one.name
            )[1]
            for one in entrants
        }
        rows: list[Numbers] = [
            {"table": "tuning", "model": one.name, "carried width": _carried_width(one.shapes[0]),
             "MLP width": one.shapes[0]["mlp_width"], "learning_rate": rate,
             "loss": loss if math.isfinite(loss) else None,  # None where it diverged
             "kept": best[one.name] == place}
            for place, ((one, rate), loss) in enumerate(zip(asked, losses, strict=True))
        ]  # fmt: skip
        chosen = [asked[best[one.name]] for one in entrants]
        return [one for one, _ in chosen], {one.name: rate for one, rate in chosen}, rows

    def _trained(
        self,
        corpus: Corpus,
        runner: Runner,
        entrants: list[Entrant],
        rates: dict[str, float],
        steps: dict[str, int],
    ) -> dict[str, list[Numbers]]:
        """Train each with every seed, seed by seed."""
        asked = [(one, seed) for seed in range(self.num_seeds) for one in entrants]
        found = runner.run(
            "models",
            tried,
            [
                self._arguments(one, rates[one.name], steps[one.name], seed)
                | ({} if seed else {"past_positions": PAST_POSITIONS})
                for one, seed in asked
            ],
            places={"folder": str(corpus.folder), "device": self.device},
            unfinished=self.out / "unfinished",
        )
        numbers: dict[str, list[Numbers]] = {one.name: [] for one in entrants}
        for (one, _), each in zip(asked, found, strict=True):
            numbers[one.name].append(each)
        return numbers


def _equal_time(
    entrants: list[Entrant], paces: dict[str, tuple[float, float]], count: int
) -> dict[str, int]:
    """Return how many steps each may take in the time that ours takes, Phase 1 included."""
    ours = entrants[0].name
    allowed = paces[ours][0] + count * paces[ours][1]
    return {name: count if name == ours else round(allowed / paces[name][1]) for name in paces}


def _needed(pace: tuple[float, float], count: int) -> float:
    """Return the seconds of Phase 1 and so many steps."""
    return pace[0] + count * pace[1]


def _evened(one: Entrant) -> Entrant:
    """Return a model whose MLPs have the nearest width that processors like."""
    shape = one.shapes[0]
    width = round(shape["mlp_width"] / _EVEN_WIDTH) * _EVEN_WIDTH
    return replace(one, shapes=(shape | {"mlp_width": width},))


def _carried_width(shape: Numbers) -> int:
    return shape["context_width"] if "cell" in shape else shape["width"]


def _ended(found: list[Numbers]) -> list[Numbers]:
    return [numbers for numbers in found if "diverged" not in numbers]


def _leads(found: list[Numbers], ours: list[Numbers], corpus: Corpus) -> Iterator[Numbers]:
    """Yield how far a model is above ours on the mix and on each part, seed by seed."""
    both = [pair for pair in zip(found, ours, strict=True) if len(_ended([*pair])) == 2]
    if not both:
        return
    for part in ("mix", *corpus.held_out):
        stores = [*corpus.held_out.values()] if part == "mix" else [corpus.held_out[part]]
        counts = np.concatenate([np.diff(store.offsets) - 1 for store in stores])
        names = list(corpus.held_out) if part == "mix" else [part]
        apart = np.array([
            np.concatenate([np.subtract(one["nats"][name], other["nats"][name]) for name in names])
            for one, other in both
        ])  # fmt: skip
        each = apart.sum(axis=1) / counts.sum()
        low, high = ratio_interval(apart.mean(axis=0), counts)
        yield {"part": part, "above ours": float(each.mean()), "low": low, "high": high,
               "spread of seeds": float(each.std(ddof=1)) if len(each) > 1 else None,
               "seeds": len(each)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Long:
    """The default, trained as long as a person waits, alone on all cores."""

    console: Console
    out: Path
    data: Path | None = None
    """Folder with `train.jsonl` and `valid.jsonl`, beside the default chats."""
    tokens: int = LONG_TOKENS

    def run(self) -> list[Numbers]:
        """Train where that was not done or not finished; return rows of counts, ours, memory."""
        threads = len(os.sched_getaffinity(0))
        config = preset("convex")
        steps = num_steps(self.tokens)
        given = {
            "model": to_dict(config.model),
            "phase1": to_dict(config.phase1),
            "phase2": to_dict(replace(config.phase2, max_steps=steps, min_steps=steps)),
            "sequence_length": config.data.sequence_length,
            "seed": 0,
            "past_positions": PAST_POSITIONS,
        }
        with opened(self.out, self.data, console=self.console, num_workers=1) as (corpus, runner):
            places = {"folder": str(corpus.folder),
                      "checkpoint": str(self.out / "long" / "checkpoint"),
                      "threads": threads}  # fmt: skip
            found = runner.run(
                "a long training", trained, [given], places=places,
                unfinished=self.out / "unfinished",
            )  # fmt: skip
            ours = Entrant(name="convex", shapes=(given["model"],), phase1=given["phase1"])
            rate = config.phase2.learning_rate
            judged = found[0]["doctor"]
            row = _row("losses", ours, rate, found, corpus)
            row["threads"] = found[0]["threads"]
            row["verdicts"] = f"{judged['token']} / {judged['sequence']}"
            counts = [row | {"table": "losses"} for row in counted(corpus)]
            return [*counts, row, *_remembered("convex", found[0]["rebuilt"])]


def num_steps(tokens: int) -> int:
    """Return the steps in which the default reads so many tokens.

    >>> num_steps(1_000_000)
    488
    """
    config = preset("convex")
    return max(1, round(tokens / config.phase2.batch_size / config.data.sequence_length))


def _median_seconds(found: list[Numbers]) -> float:
    """Return the seconds of a training, from Phase 1 on."""
    return statistics.median(
        numbers["seconds_phase1"] + numbers["seconds_cache"] + numbers["seconds"]
        for numbers in found
    )


def mixed_loss(scores: dict[str, Numbers]) -> float:
    """Return nats a token over all held-out parts together.

    >>> mixed_loss({"a": {"loss": 1.0, "num_tokens": 1}, "b": {"loss": 3.0, "num_tokens": 3}})
    2.5
    """
    total = sum(part["num_tokens"] for part in scores.values())
    return sum(part["loss"] * part["num_tokens"] for part in scores.values()) / total


def counted(corpus: Corpus) -> list[Numbers]:
    """Return the rows of n-grams, counted on the same tokens."""
    rows = []
    for order, name in _ORDERS.items():
        model = KneserNey(corpus.train, corpus.vocab_size, order)
        row: Numbers = {"table": "tokens", "model": f"Kneser-Ney {name}",
                        "tokens": corpus.train.num_tokens}  # fmt: skip
        nats = {part: model.nats(store) for part, store in corpus.held_out.items()}
        row["mix"] = float(np.concatenate([*nats.values()]).mean())
        for part, store in corpus.held_out.items():
            row[part] = float(nats[part].mean())
            row[f"{part}, bits a byte"] = float(
                nats[part].sum() / np.log(2.0) / store.num_content_bytes.sum()
            )
            row[f"{part}, assistant"] = float(nats[part][_said(store)].mean())
        rows.append(row)
    return rows


def _remembered(name: str, rebuilt: Numbers | None) -> list[Numbers]:
    """Return what all that was said is worth beyond the last tokens, by how many these are."""
    return [
        {"table": "memory", "model": name, "part": part, "tokens kept": int(reach),
         "gain": gains["mean"], "low": gains["low"], "high": gains["high"],
         "dialogues": gains["num_dialogues"], "by past": gains["by_past"]}
        for part, reached in (rebuilt or {}).items() for reach, gains in reached.items()
    ]  # fmt: skip


def _said(store: TokenStore) -> np.ndarray:
    """Return which predicted tokens the assistant says, `[N]`."""
    follows = np.ones(store.num_tokens, dtype=bool)
    follows[store.offsets[:-1]] = False
    return np.asarray(store.assistant)[follows]


def _row(
    table: str, one: Entrant, learning_rate: float, found: list[Numbers], corpus: Corpus
) -> Numbers:
    """Return one row: means over the seeds that did not diverge, and the spread of the mix."""
    row: Numbers = {"table": table, "model": one.name, "learning_rate": learning_rate}
    lost = len(found) - len(_ended(found))
    if lost:
        row["diverged"] = lost
    found = _ended(found)
    if not found:
        return row | {"seeds": 0}
    mixed = [mixed_loss(numbers["scores"]) for numbers in found]

    def mean(part: str, name: str) -> float:
        return statistics.fmean(numbers["scores"][part][name] for numbers in found)

    row |= {
        "parameters": found[0]["parameters"], "without embedding": found[0]["parameters_inner"],
        "tokens": found[0]["tokens_seen"], "seeds": len(found),
        "seconds": _median_seconds(found),
        "mix": statistics.fmean(mixed),
        "spread": statistics.stdev(mixed) if len(mixed) > 1 else None,
    }  # fmt: skip
    for part in corpus.held_out:
        row[part] = mean(part, "loss")
        row[f"{part}, bits a byte"] = mean(part, "bits_per_byte")
        row[f"{part}, assistant"] = mean(part, "loss_assistant")
    row["trained on"] = places_of(found)
    return row


def places_of(found: list[Numbers]) -> str:
    """Return on what trials were computed, which may be several machines.

    >>> places_of([{"device": "CPU with AVX512", "torch": "2.13.0"}, {"device": "NVIDIA H100"}])
    'CPU with AVX512 (PyTorch 2.13.0), NVIDIA H100'
    """
    return ", ".join(dict.fromkeys(map(_place, found)))


def _place(numbers: Numbers) -> str:
    device, version = numbers.get("device") or "CPU", numbers.get("torch")
    return device if version is None else f"{device} (PyTorch {version})"
