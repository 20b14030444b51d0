"""Phase 2: train next-token prediction, end to end through the scan or on frozen contexts.

One loop for all: what differs is where the contexts come from. Token scope reads
`f(c*.detach(), x)` of cached fixed points; sequence scope carries the context from segment to
segment, which is truncated backpropagation through time of one segment.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .cache import ContextCache
from .checkpoint import TrainingState, load_training_state, save_training_state
from .config import Phase1Config, Phase2Config
from .console import Console
from .data import Segment, SegmentStream, TokenStore, held_out_ids
from .errors import CheckpointError, NonFiniteError
from .evaluate import Evaluation, evaluate, head
from .files import understood
from .model import LanguageModel, NewLLM, token_losses
from .optimiser import Muon, fast_bfloat16
from .phase1 import contractive_loss, pair_hinge
from .recurrence import Engine

Log = Callable[[dict[str, Any]], None]

_ENGINES: tuple[Engine, ...] = get_args(Engine)
# share of losses kept in the smoothed value that progress shows
_SMOOTH = 0.95
# steps between two rows of the history
_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Phase2Data:
    """What Phase 2 reads."""

    train: TokenStore
    valid: TokenStore
    segment_length: int
    cache: ContextCache | None
    """Fixed points a vocabulary id (token scope), contexts a position (frozen), or nothing."""


@dataclass(frozen=True, kw_only=True)
class Phase2Result:
    """What Phase 2 did."""

    num_steps: int
    tokens_seen: int
    drift: float | None
    """Relative change of the fixed points since they were last rebuilt, token scope."""


def trainable(model: LanguageModel, *, freeze_context: bool) -> list[nn.Parameter]:
    """Return the parameters that Phase 2 trains, all others frozen.

    With frozen contexts nothing that a cell reads may move: embeddings, cells and the read-outs
    of all blocks but the last stay as they are.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(not freeze_context)
    if freeze_context:
        assert isinstance(model, NewLLM)
        last = model.read_outs()[-1]
        for module in (*last, model.final_norm, model.readout):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimisers(model: LanguageModel, config: Phase2Config) -> list[torch.optim.Optimizer]:
    """Return what moves the weights that Phase 2 trains; only matrices decay, embeddings do not.

    With `muon` the matrices of layers move by orthogonalised momentum, scaled so that one step size
    fits both; embeddings, gains and biases always move by AdamW.

    Source: Muon (Jordan et al. 2024) with the scale of arXiv:2502.16982; AdamW (arXiv:1711.05101).
    """
    embeddings = {id(model.embedding.weight), id(model.readout.weight)}
    chosen = {id(p) for p in trainable(model, freeze_context=config.freeze_context)}
    matrices, tables, others = [], [], []
    for name, parameter in model.named_parameters():
        if id(parameter) not in chosen:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            others.append(parameter)
        # a table of numbers, such as the decays of Mamba, is no map from one space to another
        elif parameter.ndim == 2 and name.rpartition(".")[2].startswith("weight"):
            matrices.append(parameter)
        else:
            tables.append(parameter)
    decay, rate = config.weight_decay, config.learning_rate
    optimisers: list[torch.optim.Optimizer] = []
    if config.optimiser == "muon" and matrices:
        optimisers.append(Muon(matrices, rate, weight_decay=decay))
        matrices = []
    groups = [
        {"params": [*matrices, *tables], "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimisers.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True))
    return optimisers


def learning_rate(step: int, num_steps: int, config: Phase2Config) -> float:
    """Return the step size: linear warm-up, then a cosine down to its final share.

    >>> config = Phase2Config(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    >>> [round(learning_rate(step, 1000, config), 3) for step in (0, 9, 10, 999)]
    [0.1, 1.0, 1.0, 0.1]
    """
    warmup = min(config.warmup_steps, max(num_steps // 10, 1))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    share = config.final_learning_rate
    return config.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


class _Segments:
    """The training segments in order, epoch after epoch, with random access by step."""

    def __init__(self, data: Phase2Data, config: Phase2Config, seed: int) -> None:
        self.stream = SegmentStream(
            data.train,
            batch_size=min(config.batch_size, data.train.num_dialogues),
            segment_length=data.segment_length,
            seed=seed,
        )
        steps = max(math.ceil(config.epochs * self.stream.num_segments), config.min_steps)
        self.num_steps = steps if config.max_steps is None else min(steps, config.max_steps)

    def at(self, step: int) -> Segment:
        return self.stream.segment(*self.stream.locate(step))

    def begins_epoch(self, step: int) -> bool:
        """Whether a step is the first of an epoch that is not the first."""
        epoch, index = self.stream.locate(step)
        return epoch > 0 and index == 0


def train(
    model: LanguageModel,
    data: Phase2Data,
    config: Phase2Config,
    *,
    seed: int,
    phase1: Phase1Config,
    folder: Path,
    console: Console,
    log: Log,
) -> Phase2Result:
    """Train the model in place; resumes from `folder` where an earlier call was interrupted.

    What is kept of Phase 1, hinge and contractive objective, has the settings of `phase1`.

    Raises:
        NonFiniteError: the loss became NaN or infinite; the message names the step.
        KeyboardInterrupt: Ctrl-C was pressed; the step was ended and the state saved.
    """
    if config.precision == "bfloat16" and not fast_bfloat16(model.embedding.weight.device):
        console.say("this CPU has no fast products in bfloat16: float32 would take less time")
    optimisers = make_optimisers(model, config)
    segments = _Segments(data, config, seed)
    state = load_training_state(folder, model, optimisers)
    step, tokens_seen, drift = 0, 0, None
    context = model.initial_context(segments.stream.batch_size)
    if state is not None:
        step, tokens_seen = state.values["step"], state.values["tokens_seen"]
        drift = state.values.get("drift")
        context = _saved(state, "context", context, folder)
    own = _Own(model, data, config, phase1, seed) if isinstance(model, NewLLM) else None
    if own is not None and state is not None:
        own.restore(state, folder)
    trainer = _Trainer(model, config, optimisers, context, own)

    def save() -> None:
        values = {"step": step, "tokens_seen": tokens_seen, "drift": drift,
                  "engines": None if own is None else own.engines}  # fmt: skip
        state = TrainingState(tensors=trainer.tensors(), values=values)
        save_training_state(folder, model, optimisers, state)

    every = max(segments.num_steps // config.evaluations, 1) if config.evaluations else 0
    held_out = head(data.valid, config.evaluation_tokens)
    begun = saved = time.monotonic()
    seen_before = tokens_seen
    smooth: float | None = None
    with console.track("phase 2", segments.num_steps) as advance, _interrupt() as interrupted:
        advance(step)
        while step < segments.num_steps:
            if segments.begins_epoch(step):
                drift = trainer.rebuild_rows() or drift
            trainer.set_learning_rate(learning_rate(step, segments.num_steps, config))
            segment = segments.at(step)
            for k, why in enumerate(trainer.choose_engines(segment)):
                console.say(f"block {k + 1}: {why}")
            row = trainer.step(segment, step)
            step += 1
            tokens_seen += int(segment.counts.sum())
            smooth = row["loss"] if smooth is None else _SMOOTH * smooth + 0.05 * row["loss"]
            speed = (tokens_seen - seen_before) / (time.monotonic() - begun)
            advance(1, f"loss {smooth:.3f}  {speed:,.0f} tokens/s")
            if step % _LOG_EVERY == 0 or step == segments.num_steps:
                log({"stage": "phase2", "step": step, "tokens": tokens_seen, **row})
            if every and step % every == 0 and step < segments.num_steps:
                result = evaluate(model, held_out, segment_length=data.segment_length)
                _log_evaluation(log, console, result, step, tokens_seen)
                if own is not None:
                    own.engines = None  # the coupling may have grown or shrunk
            if interrupted():
                save()
                raise KeyboardInterrupt
            if time.monotonic() - saved > config.checkpoint_seconds:
                save()
                saved = time.monotonic()
    fresh = trainer.rebuild_rows()
    return Phase2Result(
        num_steps=step, tokens_seen=tokens_seen, drift=drift if fresh is None else fresh
    )


def _saved(state: TrainingState, name: str, like: Tensor, folder: Path) -> Tensor:
    """Return a tensor of an interrupted training, in the place of another one.

    Raises:
        CheckpointError: it is missing, or not of that shape and type.
    """
    found = state.tensors.get(name)
    if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
        given = None if found is None else f"{tuple(found.shape)}, {found.dtype}"
        raise CheckpointError(
            f"a training state with {name} of {tuple(like.shape)}, {like.dtype} expected, got "
            f"{given}; delete {folder} to begin Phase 2 again"
        )
    return found.to(like.device)


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Keep the first Ctrl-C until a step is whole; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = [False]

    def ask(*_: Any) -> None:
        if asked[0]:
            raise KeyboardInterrupt
        asked[0] = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked[0]
    finally:
        signal.signal(signal.SIGINT, before)


def _log_evaluation(
    log: Log, console: Console, result: Evaluation, step: int, tokens_seen: int
) -> None:
    log({"stage": "validation", "step": step, "tokens": tokens_seen, **result.to_dict()})
    console.say(f"step {step}: validation {result.loss:.4f} nats a token")


class _Own:
    """What only our model has: contexts known already, engines, and what is kept of Phase 1."""

    def __init__(
        self, model: NewLLM, data: Phase2Data, config: Phase2Config, phase1: Phase1Config, seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.phase1 = phase1
        self.seed = seed
        held_out = held_out_ids(model.vocab_size, model.config.context_width)
        self.token_ids = np.setdiff1d(np.arange(model.vocab_size), held_out)
        self.cache = data.cache
        self.engines: list[Engine] | None = None
        self.rows: Tensor | None = None
        if model.config.scope == "token":
            if data.cache is None:
                raise ValueError("token scope needs its cache of fixed points")
            device = model.embedding.weight.device
            self.rows = torch.tensor(np.asarray(data.cache.contexts), device=device)

    def restore(self, state: TrainingState, folder: Path) -> None:
        """Go on with the rows and engines of an interrupted training."""
        engines = state.values.get("engines")
        if engines is not None:
            with understood(folder / "state.json", "a training state"):
                self.engines = [_ENGINES[_ENGINES.index(engine)] for engine in engines]
                if self.engines and len(self.engines) != self.model.config.num_blocks:
                    raise ValueError(f"{len(self.engines)} engines")
        if self.rows is not None:
            self.rows = _saved(state, "rows", self.rows, folder)

    def rebuild_rows(self) -> float | None:
        """Solve every id again with the weights of now; return how far the rows had drifted."""
        if self.rows is None or self.config.freeze_context:
            return None
        self.model.eval()
        parts = torch.arange(len(self.rows), device=self.rows.device).split(8192)
        fresh = torch.cat([self.model.search(ids).contexts for ids in parts])
        drift = (fresh - self.rows).norm() / self.rows.norm().clamp(min=1e-12)
        self.rows = fresh
        return drift.item()

    def known(self, segment: Segment, ids: Tensor) -> dict[str, Any]:
        """Return what the model is told of a segment: contexts, or engines to find them by."""
        return {"contexts": self._contexts(segment, ids), "engines": self.engines or None}

    def _contexts(self, segment: Segment, ids: Tensor) -> Tensor | None:
        """Return contexts that are known already, `[B, T, K, C]`; None to compute them."""
        if self.rows is not None:
            delivered = self.rows[ids]
            return delivered if self.config.freeze_context else self.model.rest(ids, delivered)
        if self.config.freeze_context and self.cache is not None:
            rows = self.cache.contexts[segment.rows.reshape(-1)]
            return torch.from_numpy(rows).to(ids.device).unflatten(0, ids.shape)
        return None

    def choose_engines(self, ids: Tensor) -> list[str]:
        """Choose how each block carries its context, from now on; return what to say of it."""
        if self.config.freeze_context or self.rows is not None:
            self.engines = []
            return []
        choices = self.model.choose_engines(ids, engine=self.config.engine)
        self.engines = [choice.engine for choice in choices]
        return [f"{choice.engine} ({choice.why})" for choice in choices]

    def kept(self, ids: Tensor, real: Tensor, context: Tensor, step: int) -> Tensor | float:
        """Return what is kept of Phase 1's objective, weighted, after a segment `[B, T]`."""
        total: Tensor | float = 0.0
        if self.config.freeze_context:
            return total
        if self.config.pair_hinge:
            total = total + self.config.pair_hinge * self._hinge(ids, real, context)
        every = self.config.contractive_every
        if self.config.contractive and step % every == 0:
            total = total + every * self.config.contractive * self._contractive(step)
        return total

    def _hinge(self, ids: Tensor, real: Tensor, context: Tensor) -> Tensor:
        """Keep contraction at a sample of the contexts that this segment ended in."""
        chosen = real[:, -1]
        if not chosen.any():
            return context.new_zeros(())
        x = self.model.embed(ids[:, -1][chosen])
        block = self.model.cells()[0]
        return pair_hinge(block, x, context[chosen, 0], self.phase1.contraction_target)

    def _contractive(self, step: int) -> Tensor:
        """Keep single tokens settled and apart, at a sample drawn for this step.

        Blocks take turns: what a cell reads is found by searches of the blocks before it only.
        """
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        count = (self.phase1.batch_size,)
        drawn = self.token_ids[torch.randint(len(self.token_ids), count, generator=generator)]
        ids = torch.from_numpy(drawn).to(self.model.embedding.weight.device)
        turn = step // self.config.contractive_every % self.model.config.num_blocks
        # entering evaluation costs ConvexCell a decomposition, and only dropout asks for it
        self.model.train(self.model.config.dropout == 0.0)
        x = self.model.search_inputs(ids, turn)
        self.model.train()
        return contractive_loss(self.model.cells()[turn], x, self.phase1, generator)[0]


class _Trainer:
    """One optimiser step, wherever the contexts come from."""

    def __init__(
        self,
        model: LanguageModel,
        config: Phase2Config,
        optimisers: list[torch.optim.Optimizer],
        context: Tensor,
        own: _Own | None,
    ) -> None:
        self.model = model
        self.config = config
        self.optimisers = optimisers
        self.context = context
        self.own = own

    def tensors(self) -> dict[str, Tensor]:
        """Return what must be saved beside weights and optimiser."""
        tensors = {"context": self.context}
        if self.own is not None and self.own.rows is not None:
            tensors["rows"] = self.own.rows
        return tensors

    def rebuild_rows(self) -> float | None:
        """Build cached fixed points again; return how far they had drifted, None without them."""
        return None if self.own is None else self.own.rebuild_rows()

    def choose_engines(self, segment: Segment) -> list[str]:
        """Choose engines where that is open; return what to say of each block's."""
        if self.own is None or self.own.engines is not None:
            return []
        return self.own.choose_engines(torch.from_numpy(segment.tokens).to(self.context.device))

    def set_learning_rate(self, rate: float) -> None:
        """Set the step size of all that is trained."""
        for group in self._groups():
            group["lr"] = rate

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def step(self, segment: Segment, step: int) -> dict[str, float]:
        """Train on one segment; return its losses and the gradient norm."""
        try:
            return self._step(segment, step)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"Phase 2 stopped in step {step + 1}: {error}; with a lower "
                "--phase2.learning-rate, use a new --out"
            ) from error

    def _step(self, segment: Segment, step: int) -> dict[str, float]:
        model, config, own = self.model, self.config, self.own
        model.train()
        device = self.context.device
        ids, targets, counts, assistant, starts, real = (
            torch.from_numpy(part).to(device)
            for part in (
                segment.tokens,
                segment.targets,
                segment.counts,
                segment.assistant,
                segment.starts,
                segment.real,
            )
        )
        known = {} if own is None else own.known(segment, ids)
        wide = config.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=wide):
            output = model(ids, self.context, starts=starts, real=real, **known)
        self.context = output.context.detach()
        # every position that counts is scored, so that both losses are always known
        chosen = assistant[counts]
        wanted = chosen if config.loss_on == "assistant" else torch.ones_like(chosen)
        weights = wanted.float() / wanted.sum().clamp(min=1)
        scored = token_losses(
            output.features[counts].to(torch.bfloat16 if wide else torch.float32),
            model.readout.weight,
            targets[counts],
            weights,
            chunk=config.loss_chunk,
        )
        loss = scored.loss
        if own is not None:
            loss = loss + own.kept(ids, real, self.context, step)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        if scored.loss.requires_grad:
            loss.backward()
        value = loss.item()
        trained = [p for group in self._groups() for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.gradient_clip).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteError(f"the loss must stay finite, got {value}, gradient norm {norm}")
        for optimiser in self.optimisers:
            optimiser.step()
        row = {"loss": scored.nats.mean().item(), "gradient_norm": norm}
        if chosen.any():
            row["loss_assistant"] = scored.nats[chosen].mean().item()
        return row
