"""What a model is worth on held-out dialogues: losses and verdicts.

The only place where a model is handed to the doctor.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .cell import ContextCell, ConvexCell, Weights
from .config import SolverConfig
from .console import Advance
from .data import Segment, SegmentStream, TokenStore, held_out_ids
from .distributed import World
from .doctor import (
    THRESHOLDS,
    Diagnosis,
    SequenceSubject,
    TokenSubject,
    diagnose_sequence,
    diagnose_tokens,
    non_finite,
    with_memory,
    worst,
)
from .errors import DataError, NonFiniteError
from .measurements import LONGEST_REACH, Map, lyapunov_exponent, read_back
from .model import LanguageModel, ModelOutput, NewLLM, solve_tokens, token_losses
from .recurrence import Engine, sweep
from .watch import require_finite

# positions of held-out dialogues that sequence verdicts look at
DIAGNOSED_SEQUENCES, DIAGNOSED_LENGTH = 8, 512
# held-out ids that token verdicts look at, as a multiple of C: a rank of C/4 needs some
DIAGNOSED_WIDTHS = 4
# contexts of theirs whose Jacobians and pairs are looked at
_DIAGNOSED_CONTEXTS = 256
# positions back of the token that a probe tries to read
_READ_BACK = (0, 1, 2, 4, 8, 16)
# relative difference of a parallel solve from an exact scan, from which the scan is used
_AUDITED = 1e-3
_LOSS_CHUNK = 1024
# of a bootstrap, and tokens of past that are shown together
_DRAWS, _PAST_BIN = 2000, 128
# positions, and dialogues, without which the mean of a bin is not shown
_FEWEST, _FEWEST_TOLD = 30, 4


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses on held-out dialogues."""

    loss: float
    """Nats a token, all tokens but the first of each dialogue."""
    perplexity: float
    bits_per_byte: float
    """Total nats over ln 2 and over the UTF-8 bytes of the messages' contents."""
    accuracy: float
    """Share of tokens that were the most likely one."""
    loss_assistant: float | None
    """Nats a token, assistant tokens only; None where there are none."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def head(store: TokenStore, num_tokens: int) -> TokenStore:
    """Return the first whole dialogues of a store that hold about `num_tokens`."""
    count = int(np.searchsorted(store.offsets[1:], num_tokens)) + 1
    return store.cut(0, min(count, store.num_dialogues))


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    store: TokenStore,
    *,
    batch_size: int = 16,
    segment_length: int = 512,
    engine: Engine | Literal["auto"] = "auto",
    advance: Advance | None = None,
    world: World | None = None,
    by_dialogue: np.ndarray | None = None,
) -> Evaluation:
    """Return the losses of a model on all dialogues of a store, contexts carried, dropout off.

    Memory does not grow with the length of a dialogue: segments follow one another, and their
    contexts are carried. Several processes take a share of the dialogues each, and all get the
    same.

    Args:
        model: in any mode; it is evaluated.
        store: held-out dialogues.
        batch_size: dialogues read side by side.
        segment_length: tokens of each that are read at once.
        engine: of our cells.
        advance: is told of tokens read.
        world: the processes that share the work.
        by_dialogue: float64 `[D]`, to which the nats of each of the D dialogues are added; of
            several processes each adds those of its share.

    Raises:
        DataError: no token can be predicted.
        NonFiniteError: the loss is NaN or infinite; the message names the first such weight.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    read = _Engined(model, engine) if isinstance(model, NewLLM) else model
    nats = assistant_nats = 0.0
    count = assistant_count = correct = 0
    share = world.share(store.num_dialogues)
    mine = store.cut(share.start, share.stop)
    lanes = min(batch_size, mine.num_dialogues)
    context = model.initial_context(lanes)
    for segment in _segments(mine, lanes, segment_length):
        ids, targets, counts, starts, real, assistant = (
            torch.from_numpy(part).to(device)
            for part in (
                segment.tokens,
                segment.targets,
                segment.counts,
                segment.starts,
                segment.real,
                segment.assistant,
            )
        )
        output = read(ids, context, starts=starts, real=real)
        context = output.context
        scored = token_losses(
            output.features[counts],
            model.readout.weight,
            targets[counts],
            torch.ones_like(targets[counts], dtype=torch.float32),
            chunk=_LOSS_CHUNK,
        )
        chosen = assistant[counts]
        if by_dialogue is not None:
            of = np.searchsorted(mine.offsets, segment.rows[segment.counts], side="right") - 1
            np.add.at(by_dialogue, share.start + of, scored.nats.double().cpu().numpy())
        nats += scored.nats.double().sum().item()
        assistant_nats += scored.nats[chosen].double().sum().item()
        count += len(scored.nats)
        assistant_count += int(chosen.sum())
        correct += int(scored.correct.sum())
        if advance is not None:
            advance(int(segment.real.sum()))
    model.train(was_training)
    sums = [nats, assistant_nats, count, assistant_count, correct]
    nats, assistant_nats, *counted = world.total(torch.tensor(sums, dtype=torch.float64)).tolist()
    count, assistant_count, correct = map(round, counted)
    if count == 0:
        raise DataError("at least one token to predict expected, got none; give longer dialogues")
    num_bytes = int(store.num_content_bytes.sum())
    loss = nats / count
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    require_finite({"the loss": loss}, parameters, "evaluation", world)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2.0) / max(num_bytes, 1),
        accuracy=correct / count,
        loss_assistant=assistant_nats / assistant_count if assistant_count else None,
        num_tokens=count,
        num_bytes=num_bytes,
    )


def _segments(store: TokenStore, lanes: int, length: int) -> Iterator[Segment]:
    """Yield all segments of a store; none of one without dialogues."""
    if lanes:
        stream = SegmentStream(store, batch_size=lanes, segment_length=length, seed=None)
        yield from (stream.segment(0, index) for index in range(stream.num_segments))


class _Engined:
    """Reads segments by the engines that the first one chose, if they pass an audit there."""

    def __init__(self, model: NewLLM, engine: Engine | Literal["auto"]) -> None:
        self.model = model
        self.engine: Engine | Literal["auto"] = engine
        self.weights = model.weights()
        self.engines: list[Engine] | None = None

    def __call__(self, ids: Tensor, context: Tensor, *, starts: Tensor, real: Tensor) -> Any:
        first = self.engines is None
        if self.engines is None:
            self.engines = []
            if self.model.config.scope == "sequence":
                choices = self.model.choose_engines(ids, engine=self.engine)
                self.engines = [choice.engine for choice in choices]
        output = self._read(ids, context, starts, real)
        if first and not {*self.engines} <= {"scan"}:
            apart = self.model.audit(ids, context, output.carried, starts=starts, real=real)
            if apart > _AUDITED:
                self.engines = ["scan" for _ in self.engines]
                output = self._read(ids, context, starts, real)
        return output

    def _read(self, ids: Tensor, context: Tensor, starts: Tensor, real: Tensor) -> ModelOutput:
        return self.model(
            ids, context, starts=starts, real=real, weights=self.weights,
            engines=self.engines or None,
        )  # fmt: skip


@torch.no_grad()
def token_verdict(model: NewLLM, ids: Tensor | None = None) -> Diagnosis:
    """Judge the fixed points of held-out token ids, every block apart; the worst one counts.

    Without `ids` 4C of those that Phase 1 never trains on, evenly over the vocabulary: the work
    does not grow with it. How many there are to choose from stands among the measurements.

    >>> from new_llm.config import ModelConfig
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...>
    >>> small = ModelConfig(context_width=16, embedding_width=16, hidden_width=16, num_blocks=1)
    >>> found = token_verdict(NewLLM(small, 400))
    >>> found.scope, found.measurements["q2"].value < 1.0
    ('token', True)
    """
    return _judged(model, "token", lambda: _of_tokens(model, ids))


def _judged(model: NewLLM, scope: str, judge: Callable[[], Diagnosis]) -> Diagnosis:
    """Return a verdict of a model as it is in use; that of NaN is one too."""
    was_training = model.training
    model.eval()
    try:
        return judge()
    except NonFiniteError:
        return non_finite(scope)
    finally:
        model.train(was_training)


def _of_tokens(model: NewLLM, ids: Tensor | None) -> Diagnosis:
    population = None
    if ids is None:
        width = model.config.context_width
        held_out = held_out_ids(model.vocab_size, width)
        population = len(held_out)
        # evenly over the vocabulary: low ids are frequent tokens in most tokenizers
        places = np.linspace(0, len(held_out) - 1, min(DIAGNOSED_WIDTHS * width, len(held_out)))
        ids = torch.from_numpy(held_out[places.astype(int)])
    found = model.search(ids.to(model.embedding.weight.device))
    deep = SolverConfig(
        metric="residual",
        tolerance=THRESHOLDS.residual,
        max_iterations=THRESHOLDS.max_iterations,
    )
    diagnoses = []
    for k, cell in enumerate(model.cells()):
        x = found.inputs[k]
        subject = TokenSubject(
            delivered=found.contexts[:, k],
            apply=_at_rows(cell, cell.search_map, x),
            settle=lambda start, cell=cell, x=x: solve_tokens(cell, x, start, deep),
            convex=cell.separates_gate,
            forget=_at_rows(cell, cell.forget_gates, x),
            proved=cell.coupling() if isinstance(cell, ConvexCell) else {},
            population=population,
        )
        diagnoses.append(_of_ids(diagnose_tokens(subject), ids))
    return worst(diagnoses)


def _of_ids(diagnosis: Diagnosis, ids: Tensor) -> Diagnosis:
    """Let the portraits name token ids, `[N]`, instead of rows."""
    named = [replace(one, rows=ids[one.rows].tolist()) for one in diagnosis.portraits]
    return replace(diagnosis, portraits=tuple(named))


def _at_rows(
    cell: ContextCell, function: Callable[[Tensor, Tensor, Weights], Tensor], x: Tensor
) -> Map:
    """Return `function` of contexts and of the tokens of chosen rows of `x`, `[N, E]`."""
    projected, weights = cell.project(x), cell.weights()
    return lambda context, rows: function(context, projected[rows], weights)


@torch.no_grad()
def sequence_verdict(model: NewLLM, store: TokenStore, *, trained: bool) -> Diagnosis:
    """Judge the contexts carried through held-out dialogues; `trained`: after Phase 2.

    >>> from new_llm.config import ModelConfig
    >>> ids = (np.arange(400) * 7 % 50).astype(np.int32)
    >>> store = TokenStore(tokens=ids, assistant=ids > 0, offsets=np.array([0, 200, 400]),
    ...                    num_content_bytes=np.array([9, 9]), fingerprint="")
    >>> small = ModelConfig(context_width=16, embedding_width=16, hidden_width=16, num_blocks=1)
    >>> found = sequence_verdict(NewLLM(small, 50), store, trained=False)
    >>> found.scope, found.measurements["lyapunov"].passed
    ('sequence', True)
    """
    return _judged(model, "sequence", lambda: _of_text(model, store, trained=trained))


def _of_text(model: NewLLM, store: TokenStore, *, trained: bool) -> Diagnosis:
    ids, starts, real = _diagnosed_text(store, model.embedding.weight.device)
    zero = model.initial_context(len(ids))
    inputs, contexts = model.stream_contexts(ids, zero, starts=starts, real=real)
    carried_on = real & ~starts
    diagnoses = []
    for k, cell in enumerate(model.cells()):
        x, initial = inputs[k], zero[:, k]
        limit = THRESHOLDS.gate_scan_sweeps if cell.separates_gate else THRESHOLDS.jacobi_sweeps
        swept = sweep(
            cell,
            x,
            initial,
            starts=starts,
            real=real,
            tolerance=THRESHOLDS.residual,
            max_sweeps=limit,
        )
        carried, weights = cell.project(x), cell.weights()

        def step(
            context: Tensor,
            t: int,
            cell: Any = cell,
            carried: Tensor = carried,
            weights: Any = weights,
        ) -> Tensor:
            copies = len(context) // len(carried)
            # where a dialogue begins the first run begins anew, the others as far from it as before
            left = context[: len(carried)] * starts[:, t, None]
            return cell.update(
                context - left.repeat(copies, 1), carried[:, t].repeat(copies, 1), weights
            )

        exponent, decay = lyapunov_exponent(step, initial, carried_on)
        small = (decay < math.exp(-1.0)).nonzero()
        before = torch.cat([initial[:, None], contexts[k][:, :-1]], dim=1)[carried_on]
        every = max(1, len(before) // _DIAGNOSED_CONTEXTS)
        chosen_x = x[carried_on][::every]
        subject = SequenceSubject(
            contexts=contexts[k][real],
            sweeps=swept,
            residual=swept.residual[real].max().item(),
            distance=_largest_distance(swept.contexts[real], contexts[k][real]),
            lyapunov=exponent,
            decay_length=float(small[0]) + 1.0 if len(small) else math.inf,
            apply=_at_rows(cell, cell.search_map, chosen_x),
            before=before[::every],
            convex=cell.separates_gate,
            forget=_at_rows(cell, cell.forget_gates, chosen_x),
            read_back=_read_back(contexts[k], ids, starts, real),
        )
        diagnoses.append(_of_ids(diagnose_sequence(subject), ids[real]))
    gain, length = memory_gain(model, ids, starts, real)
    return with_memory(worst(diagnoses), gain_nats=gain, context_length=length, trained=trained)


def _largest_distance(found: Tensor, wanted: Tensor) -> float:
    """Return the largest relative distance of rows `[N, C]`."""
    apart = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)
    return apart.max().item()


def _read_back(
    contexts: Tensor, ids: Tensor, starts: Tensor, real: Tensor
) -> dict[int, tuple[float, float]]:
    """Return what a linear probe reads of earlier tokens of the same dialogue, and guessing."""
    dialogue = starts.long().cumsum(dim=1)
    found = {}
    for back in _READ_BACK:
        now, then = slice(back, None), slice(None, ids.shape[1] - back)
        same = real[:, now] & real[:, then] & (dialogue[:, now] == dialogue[:, then])
        found[back] = read_back(contexts[:, now][same], ids[:, then][same])
    return found


def _diagnosed_text(store: TokenStore, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    part = head(store, DIAGNOSED_SEQUENCES * DIAGNOSED_LENGTH)
    batch = min(DIAGNOSED_SEQUENCES, part.num_dialogues)
    stream = SegmentStream(part, batch_size=batch, segment_length=DIAGNOSED_LENGTH, seed=None)
    segment = stream.segment(0, 0)
    ids, starts, real = (
        torch.from_numpy(value).to(device)
        for value in (segment.tokens, segment.starts, segment.real)
    )
    return ids, starts, real


@torch.no_grad()
def memory_gain(
    model: NewLLM, ids: Tensor, starts: Tensor, real: Tensor
) -> tuple[float, float | None]:
    """Return what the carried context is worth, nats a token, and how far back it reaches.

    The first is the loss with the context zeroed before every token, less the loss with it. The
    second is the smallest number of tokens of context from which on the loss is within the amnesia
    threshold of that of the whole context: the context is zeroed every 256 tokens and the loss is
    compared position by position, by the tokens since, wherever a dialogue had begun before that.
    None where none had: nothing can be told from such short texts.
    """
    follows = real[:, 1:] & ~starts[:, 1:]

    def nats(cut: Tensor) -> Tensor:
        features = model(ids, starts=cut, real=real).features[:, :-1][follows]
        ones = torch.ones(len(features), device=features.device)
        return token_losses(
            features, model.readout.weight, ids[:, 1:][follows], ones, chunk=_LOSS_CHUNK
        ).nats

    whole = nats(starts)
    if len(whole) == 0:
        return 0.0, None
    gain = (nats(torch.ones_like(starts)) - whole).mean().item()
    positions = torch.arange(ids.shape[1], device=ids.device)
    since = positions % LONGEST_REACH
    lost = nats(starts | (since == 0)) - whole
    # a dialogue that began since then lost nothing, whatever its context is worth
    began = torch.where(starts, positions, 0).cummax(dim=1).values
    cut = (began < positions - since)[:, :-1][follows]
    if not cut.any():
        return gain, None
    # tokens of context that are left to a position, its own among them
    lost, age = lost[cut], (since + 1).expand_as(starts)[:, :-1][follows][cut]
    edges = [1, 2, 4, 8, 16, 32, 64, 128, LONGEST_REACH + 1]
    length = float(LONGEST_REACH)
    # few tokens are young: chance may hide what they lost, but not what older ones still lose
    for low, high in reversed([*itertools.pairwise(edges)]):
        chosen = lost[(age >= low) & (age < high)]
        if len(chosen) and not chosen.mean() < THRESHOLDS.amnesia_nats:
            break
        length = float(low)
    return gain, length


@torch.no_grad()
def rebuilt_gains(
    model: LanguageModel,
    store: TokenStore,
    reaches: Sequence[int] = (16, 64, 128),
    *,
    num_dialogues: int = 40,
    num_positions: int = 1000,
) -> dict[int, dict[str, Any]]:
    """Return what the whole past is worth beyond one rebuilt from the last tokens only, in nats.

    In the longest dialogues of a store, evenly spaced tokens with more past than the largest reach
    are predicted twice: from all that was said, and from the last tokens read from zero. The
    difference is paired; its interval is that of `ratio_interval`.

    Args:
        model: in any mode; it is evaluated.
        store: held-out dialogues.
        reaches: tokens that a context is rebuilt from.
        num_dialogues: the longest so many.
        num_positions: predicted tokens of all dialogues together, about.

    Returns:
        For each reach `mean`, `low`, `high` (95 %), `num_dialogues` that were long enough, and
        `by_past`: the mean gain by the tokens before, in bins from 128 to 256, to 512, and so on
        doubled, where a bin has 30 positions of four dialogues.

    Raises:
        DataError: no dialogue is long enough.
    """
    was_training = model.training
    model.eval()
    longest, device = max(reaches), model.embedding.weight.device
    order = np.argsort(-np.diff(store.offsets), kind="stable")[:num_dialogues]
    texts = [torch.from_numpy(store.dialogue(i).astype(np.int64)).to(device) for i in order]
    texts = [ids for ids in texts if len(ids) > longest + 1]
    if not texts:
        raise DataError(f"a dialogue of more than {longest + 1} tokens expected, got none")
    every = max(1, sum(len(ids) - longest - 1 for ids in texts) // num_positions)
    places = [torch.arange(longest + 1, len(ids), every) for ids in texts]
    whole = [
        _scored(model, model(ids[None, :-1]).features[0, at - 1], ids[at]).cpu()
        for ids, at in zip(texts, places, strict=True)
    ]
    found = {}
    for reach in reaches:
        gains = []
        for ids, at, known in zip(texts, places, whole, strict=True):
            window = at[:, None] + torch.arange(-reach, 0)
            nats = [
                # only the last position of a window is projected to the vocabulary
                _scored(model, model(ids[part]).features[:, -1], ids[part[:, -1] + 1])
                for part in window.split(64)
            ]
            gains.append(torch.cat(nats).cpu() - known)
        found[reach] = _bootstrapped(gains, places)
    model.train(was_training)
    return found


def _scored(model: LanguageModel, features: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, `[N, E]` and `[N]` to `[N]`."""
    ones = torch.ones(len(features), device=features.device)
    return token_losses(features, model.readout.weight, targets, ones, chunk=_LOSS_CHUNK).nats


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over tokens, whole dialogues drawn anew 2,000 times.

    Args:
        sums: of each dialogue, `[D]`.
        counts: its tokens, `[D]`.

    Source: percentile bootstrap (Efron 1979).

    >>> low, high = ratio_interval(np.array([2.0, 4.0, 9.0]), np.array([2, 4, 3]))
    >>> 1.0 <= low < 15.0 / 9.0 < high <= 3.0
    True
    """
    draws = np.random.default_rng(0).integers(len(sums), size=(_DRAWS, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _bootstrapped(gains: list[Tensor], places: list[Tensor]) -> dict[str, Any]:
    sums = np.array([gain.double().sum().item() for gain in gains])
    counts = np.array([len(gain) for gain in gains])
    low, high = ratio_interval(sums, counts)
    past, gain = torch.cat(places), torch.cat(gains)
    told = torch.repeat_interleave(torch.arange(len(gains)), torch.from_numpy(counts))
    doubled = (past / _PAST_BIN).log2().floor().clamp(min=0).long()
    by_past = {
        str(_PAST_BIN << int(bin_)): gain[doubled == bin_].mean().item()
        for bin_ in doubled.unique()
        if (doubled == bin_).sum() >= _FEWEST
        and len(told[doubled == bin_].unique()) >= _FEWEST_TOLD
    }
    return {"mean": sums.sum() / counts.sum(), "low": low, "high": high,
            "num_dialogues": len(gains), "by_past": by_past}  # fmt: skip


def verdict_dict(token: Diagnosis, sequence: Diagnosis | None) -> dict[str, Any]:
    """Return both scopes as the result file holds them."""
    return {
        "token": token.to_dict(),
        "sequence": None if sequence is None else sequence.to_dict(),
    }


def portraits(
    token: Diagnosis, sequence: Diagnosis | None, counts: Tensor
) -> dict[str, list[dict[str, Any]]]:
    """Return what a page shows of both scopes, a block each, with how frequent its tokens are.

    Args:
        token: verdict of the token scope.
        sequence: that of the sequence scope, where there is one.
        counts: occurrences of each vocabulary id in the training dialogues, `[V]`.
    """
    return {
        diagnosis.scope: [
            {**asdict(portrait), "counts": counts[portrait.rows].tolist()}
            for portrait in diagnosis.portraits
        ]
        for diagnosis in (token, sequence)
        if diagnosis is not None
    }
