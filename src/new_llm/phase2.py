"""Phase 2: train next-token prediction, end to end through the scan or on frozen contexts.

One loop for all: what differs is where the contexts come from. Token scope reads
`f(c*.detach(), x)` of cached fixed points; sequence scope carries the context from segment to
segment, which is truncated backpropagation through time of one segment. Several processes take a
share of the lanes each; sums over a step's tokens are those of all.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cache import ContextCache
from .cell import ConvexCell, Stacks
from .checkpoint import load_weights
from .config import Phase1Config, Phase2Config, fingerprint
from .console import Console
from .data import Segment, SegmentStream, TokenStore, held_out_ids
from .distributed import World, is_divided, undivided, whole
from .doctor import THRESHOLDS
from .errors import ConfigError, NonFiniteError
from .evaluate import Evaluation, evaluate, head
from .model import LanguageModel, NewLLM, token_losses
from .optimiser import Muon, fast_bfloat16
from .phase1 import contractive_loss, pair_hinge
from .recurrence import Engine
from .resume import Keeper, TrainingState
from .watch import Watch, first_bad, require_finite

Log = Callable[[dict[str, Any]], None]
Snapshot = Callable[[str, NewLLM, dict[str, Any]], None]
"""Keeps a model by a name, with what is known of it."""

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
class Snapshots:
    """Which models are kept on the way, beside the last."""

    keep: Snapshot
    best: bool
    """That of the lowest held-out loss while training."""
    every: int | None
    """One each so many steps; none keeps none."""


@dataclass(frozen=True, kw_only=True)
class Phase2Result:
    """What Phase 2 did."""

    model: LanguageModel = field(compare=False)
    """The one that was given, or its like where its parameters were divided among processes."""

    num_steps: int
    tokens_seen: int
    seconds: float = field(compare=False)
    """Of all processes that it took, one after another where it was interrupted."""

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


def _drawing(what: str, seed: int, step: int) -> torch.Generator:
    """Return a generator for what is drawn in one step; it can be asked for in any order.

    Of a seed it keeps the low 32 bits, so that a hash tells seeds and steps apart.
    """
    return torch.Generator().manual_seed(int(fingerprint([what, seed, step])[:8], 16))


def make_optimisers(model: LanguageModel, config: Phase2Config) -> list[torch.optim.Optimizer]:
    """Return what moves the weights that Phase 2 trains; only matrices decay, embeddings do not.

    With `muon` the matrices of layers move by orthogonalised momentum, scaled so that one step size
    fits both, gates that share a matrix each by itself; embeddings, gains and biases always move
    by AdamW.

    Source: Muon (Jordan et al. 2024) with the scale of arXiv:2502.16982; AdamW (arXiv:1711.05101).
    """
    embeddings = {id(model.embedding.weight), id(model.readout.weight)}
    chosen = {id(p) for p in trainable(model, freeze_context=config.freeze_context)}
    matrices, kernels, others = [], [], []
    for name, parameter in model.named_parameters():
        if id(parameter) not in chosen:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            others.append(parameter)
        # a table of numbers, such as the rates of Mamba, is no map from one space to another
        elif not name.rpartition(".")[2].startswith("weight"):
            others.append(parameter)
        elif parameter.ndim == 2:
            matrices.append(parameter)
        else:
            kernels.append(parameter)
    decay, rate = config.weight_decay, config.learning_rate
    optimisers: list[torch.optim.Optimizer] = []
    if config.optimiser == "muon" and matrices:
        wide = torch.float32 if config.muon_precision == "float32" else None
        parts = {
            id(module.get_parameter(name)): count
            for module in model.modules()
            if isinstance(module, Stacks)
            for name, count in module.stacked.items()
        }
        counts = [parts.get(id(matrix), 1) for matrix in matrices]
        stacks: list[dict[str, Any]] = [
            {"params": [m for m, c in zip(matrices, counts, strict=True) if c == count],
             "parts": count}
            for count in sorted({*counts})
        ]  # fmt: skip
        optimisers.append(Muon(stacks, rate, weight_decay=decay, dtype=wide))
        matrices = []
    groups = [
        {"params": [*matrices, *kernels], "weight_decay": decay},
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

    def __init__(self, data: Phase2Data, config: Phase2Config, seed: int, world: World) -> None:
        self.stream = SegmentStream(
            data.train,
            batch_size=min(config.batch_size, data.train.num_dialogues),
            segment_length=data.segment_length,
            seed=seed,
        )
        if self.stream.batch_size < world.size:
            raise ConfigError(
                f"a lane for each of {world.size} processes expected, got "
                f"{self.stream.batch_size}; raise --phase2.batch-size, or give more dialogues"
            )
        self.lanes = world.share(self.stream.batch_size)
        steps = max(math.ceil(config.epochs * self.stream.num_segments), config.min_steps)
        self.num_steps = steps if config.max_steps is None else min(steps, config.max_steps)

    def at(self, step: int) -> Segment:
        """Return this process's lanes of a step."""
        return self.stream.segment(*self.stream.locate(step), self.lanes)

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
    console: Console,
    log: Log,
    keeper: Keeper | None = None,
    snapshots: Snapshots | None = None,
    sharded: bool = False,
) -> Phase2Result:
    """Train the model in place; with a keeper it goes on where it was interrupted.

    What is kept of Phase 1, hinge and contractive objective, has the settings of `phase1`.

    Args:
        model: all of it on every process, the same.
        data: what is read.
        config: of this phase.
        seed: of the order and of draws.
        phase1: its config.
        console: for progress.
        log: takes the rows of the history.
        keeper: of the state, and of the processes that train together.
        snapshots: which models are kept on the way.
        sharded: divide parameters, gradients and optimiser among the processes.

    Raises:
        NonFiniteError: context, loss or gradient became NaN or infinite; the message names the
            step and the tensor.
        ConfigError: there are fewer lanes than processes.
        KeyboardInterrupt: Ctrl-C was pressed; the step was ended and the state kept.
    """
    if config.precision == "bfloat16" and not fast_bfloat16(model.embedding.weight.device):
        console.say("this CPU has no fast products in bfloat16: float32 would take less time")
    training = _Training(model, data, config, seed, phase1, keeper or Keeper(), sharded)
    training.say, training.log = console.say, log
    segments, keeper = training.segments, training.keeper
    every = max(segments.num_steps // config.evaluations, 1) if config.evaluations else 0
    held_out = head(data.valid, config.evaluation_tokens)
    begun, seen_before = time.monotonic(), training.tokens_seen
    smooth: float | None = None
    with console.track("phase 2", segments.num_steps) as advance, keeper.watching():
        advance(training.step)
        while training.step < segments.num_steps:
            with training.explained():
                row = training.take_step()
            step = training.step
            smooth = row["loss"] if smooth is None else _SMOOTH * smooth + 0.05 * row["loss"]
            speed = (training.tokens_seen - seen_before) / (time.monotonic() - begun)
            advance(1, f"loss {smooth:.3f}  {speed:,.0f} tokens/s")
            if step % _LOG_EVERY == 0 or step == segments.num_steps:
                log({"stage": "phase2", "step": step, "tokens": training.tokens_seen, **row})
            if every and step % every == 0 and step < segments.num_steps:
                with training.explained(), undivided(training.objective):
                    training.look_at_coupling()
                    result = evaluate(
                        model, held_out, segment_length=data.segment_length, world=keeper.world
                    )
                _log_evaluation(log, console, result, step, training.tokens_seen)
                training.forget_engines()
                if snapshots is not None and snapshots.best and training.is_best(result.loss):
                    about = {"step": step, "loss": result.loss}
                    training.keep_snapshot(snapshots.keep, "best", about)
            if snapshots is not None and snapshots.every and step % snapshots.every == 0:
                training.keep_snapshot(snapshots.keep, f"step-{step:08d}", {"step": step})
            with training.explained():
                keeper.after_step(training.save)
    return training.result()


def _log_evaluation(
    log: Log, console: Console, result: Evaluation, step: int, tokens_seen: int
) -> None:
    log({"stage": "validation", "step": step, "tokens": tokens_seen, **result.to_dict()})
    console.say(f"step {step}: validation {result.loss:.4f} nats a token")


class _Own:
    """What only our model has: contexts known already, engines, and what is kept of Phase 1."""

    def __init__(
        self,
        model: NewLLM,
        data: Phase2Data,
        config: Phase2Config,
        phase1: Phase1Config,
        seed: int,
        num_lanes: int,
        world: World,
    ) -> None:
        self.model = model
        self.num_lanes = num_lanes
        self.world = world
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

    def restore(self, state: TrainingState) -> None:
        """Go on with the rows and engines of an interrupted training."""
        self.engines = state.values["engines"]
        if self.rows is not None:
            self.rows = state.tensors["rows"].to(self.rows.device)

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

        def measured() -> list[list[str]]:
            choices = self.model.choose_engines(ids, engine=self.config.engine)
            return [[choice.engine, choice.why] for choice in choices]

        # a text of one process decides for all
        chosen: Any = self.world.told(measured)
        self.engines = [engine for engine, _ in chosen]
        return [f"{engine} ({why})" for engine, why in chosen]

    def kept(self, ids: Tensor, real: Tensor, context: Tensor, step: int) -> Tensor:
        """Return what is kept of Phase 1's objective, weighted, after a segment `[B, T]`."""
        total = context.new_zeros(())
        if self.config.freeze_context:
            return total
        if self.config.pair_hinge:
            total = total + self.config.pair_hinge * self._hinge(ids, real, context, step)
        every = self.config.contractive_every
        if self.config.contractive and step % every == 0:
            total = total + every * self.config.contractive * self._contractive(step)
        return total

    def _hinge(self, ids: Tensor, real: Tensor, context: Tensor, step: int) -> Tensor:
        """Keep contraction at a sample of the contexts that this segment ended in."""
        lanes, width = self.num_lanes, context.shape[-1]
        generator = _drawing("hinge", self.seed, step)
        noise = torch.randn((lanes, width), generator=generator)[self.world.share(lanes)]
        x = self.model.embed(ids[:, -1])
        cell, target = self.model.cells()[0], self.phase1.contraction_target
        each = pair_hinge(cell, x, context[:, 0], noise.to(context), target)
        # padding at the end of a lane is no token of a text
        chosen = real[:, -1].float()
        found = self.world.gathered(torch.stack([each * chosen, chosen], dim=1), lanes).sum(dim=0)
        return found[0] / found[1].clamp(min=1.0)

    def _contractive(self, step: int) -> Tensor:
        """Keep single tokens settled and apart, at a sample drawn for this step.

        Blocks take turns: what a cell reads is found by searches of the blocks before it only.
        """
        generator = _drawing("contractive", self.seed, step)
        count = (self.phase1.batch_size,)
        drawn = self.token_ids[torch.randint(len(self.token_ids), count, generator=generator)]
        ids = torch.from_numpy(drawn).to(self.model.embedding.weight.device)
        turn = step // self.config.contractive_every % self.model.config.num_blocks
        # entering evaluation costs ConvexCell a decomposition, and only dropout asks for it
        self.model.train(self.model.config.dropout == 0.0)
        x = self.model.search_inputs(ids, turn)
        self.model.train()
        cell = self.model.cells()[turn]
        return contractive_loss(cell, x, self.phase1, generator, world=self.world)[0]


class _Objective(nn.Module):
    """The loss of a segment as a module: what an engine for several processes wraps."""

    own: _Own | None

    def __init__(self, model: LanguageModel, config: Phase2Config, own: _Own | None) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.own = own
        self.num_sweeps: list[int] = []

    def forward(
        self, segment: Segment, context: Tensor, step: int, num_wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the share of the cross-entropy, what is kept of Phase 1, nats, and the context.

        Args:
            segment: this process's lanes.
            context: before it, `[B, ...]`.
            step: its number.
            num_wanted: positions of all processes that are in the loss.
        """
        model, config, own = self.model, self.config, self.own
        device = context.device
        ids, targets, counts, starts, real = (
            torch.from_numpy(part).to(device)
            for part in (
                segment.tokens,
                segment.targets,
                segment.counts,
                segment.starts,
                segment.real,
            )
        )
        known = {} if own is None else own.known(segment, ids)
        wide = config.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=wide):
            output = model(ids, context, starts=starts, real=real, **known)
        self.num_sweeps = [
            found.sweeps.num_sweeps for found in output.carried if found.engine == "gate-scan"
        ]
        # every position that counts is scored, so that both losses are always known
        wanted = torch.from_numpy(wanted_positions(segment, config)).to(device)[counts]
        scored = token_losses(
            output.features[counts].to(torch.bfloat16 if wide else torch.float32),
            model.readout.weight,
            targets[counts],
            wanted.float() / num_wanted.clamp(min=1),
            chunk=config.loss_chunk,
        )
        after = output.context.detach()
        kept = after.new_zeros(()) if own is None else own.kept(ids, real, after, step)
        return scored.loss, kept, scored.nats, after


def wanted_positions(segment: Segment, config: Phase2Config) -> np.ndarray:
    """Return which positions are in the loss, bool `[B, T]`."""
    return segment.assistant if config.loss_on == "assistant" else segment.counts


class _Training:
    """One training of Phase 2, a step at a time, wherever the contexts come from."""

    say: Callable[[str], None]
    log: Log

    def __init__(
        self,
        model: LanguageModel,
        data: Phase2Data,
        config: Phase2Config,
        seed: int,
        phase1: Phase1Config,
        keeper: Keeper,
        sharded: bool,
    ) -> None:
        world = keeper.world
        self.model = model
        self.config = config
        self.keeper = keeper
        self.segments = _Segments(data, config, seed, world)
        self.lanes = self.segments.stream.batch_size
        self.step, self.tokens_seen, self.drift = 0, 0, None
        self.best = math.inf
        self.watch = Watch()
        kept = keeper.values()
        goes_on = kept is not None and kept["phase"] == "phase2"
        if goes_on:
            # before parameters are divided among processes
            load_weights(keeper.weights(), model)
            # as it was when it was kept: entering evaluation makes what a limit rests on exact
            model.train()
        trainable(model, freeze_context=config.freeze_context)
        context = model.initial_context(self.lanes)
        self.own = None
        if isinstance(model, NewLLM):
            self.own = _Own(model, data, config, phase1, seed, self.lanes, world)
        cells = model.cells() if isinstance(model, NewLLM) else []
        partly = any(cell.has_idle_weights for cell in cells)
        self.objective = world.replicated(
            _Objective(model, config, self.own), sharded=sharded, partly=partly
        )
        self.optimisers = make_optimisers(model, config)
        if goes_on:
            state = keeper.load((None, self.optimisers))
            values = state.values
            self.step, self.tokens_seen = values["step"], values["tokens_seen"]
            self.drift = values["drift"]
            self.best = math.inf if values["best"] is None else values["best"]
            self.watch.restore(values["watch"])
            context = state.tensors["context"].to(context.device)
            if self.own is not None:
                self.own.restore(state)
        self.context = context[self.segments.lanes]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of a number that is not finite where it was, and what is kept from before it."""
        try:
            yield
        except NonFiniteError as error:
            place = f"Phase 2 stopped after step {self.step}: "
            # what a solver finds does not know names
            named = "" if " are not finite)" in str(error) else first_bad(self._weights())
            raise error.saying(
                f"{place}{error}{named}; {self.keeper.last_good()}; with a lower "
                "--phase2.learning-rate, use a new --out"
            ) from error

    def _weights(self) -> dict[str, Tensor | None]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def take_step(self) -> dict[str, float]:
        """Train on one segment; return its losses and the gradient norm."""
        step, world = self.step, self.keeper.world
        if self.segments.begins_epoch(step) and self.own is not None:
            with undivided(self.objective):
                self.drift = self.own.rebuild_rows() or self.drift
        rate = learning_rate(step, self.segments.num_steps, self.config)
        for group in self._groups():
            group["lr"] = rate
        segment = self.segments.at(step)
        if self.own is not None and self.own.engines is None:
            with undivided(self.objective):
                ids = torch.from_numpy(segment.tokens).to(self.context.device)
                for k, why in enumerate(self.own.choose_engines(ids)):
                    self.say(f"block {k + 1}: {why}")
        with world.guarded():
            row, num_counted = self._descend(segment)
        self.step += 1
        self.tokens_seen += num_counted
        self._warn(self.watch.loss(self.step, row["loss"]))
        for k, sweeps in enumerate(self.num_sweeps()):
            most = THRESHOLDS.gate_scan_sweeps
            self._warn(self.watch.sweeps(self.step, k + 1, sweeps, most))
        return row

    def _descend(self, segment: Segment) -> tuple[dict[str, float], int]:
        world, config = self.keeper.world, self.config
        self.model.train()
        device = self.context.device
        wanted = torch.tensor(float(wanted_positions(segment, config).sum()), device=device)
        loss, kept, nats, after = self.objective(
            segment, self.context, self.step, world.total(wanted)
        )
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        share = world.scaled(loss + kept)
        if share.requires_grad:
            share.backward()
        chosen = torch.from_numpy(segment.assistant[segment.counts]).to(device)
        sums = torch.stack(
            [
                nats.double().sum(),
                nats[chosen].double().sum(),
                loss.detach().double(),
                torch.tensor(float(len(nats)), device=device).double(),
                chosen.sum().double(),
                (~torch.isfinite(after)).sum().double(),
            ]
        )
        total, of_assistant, cross_entropy, count, num_chosen, bad = world.total(sums).tolist()
        parameters = [p for group in self._groups() for p in group["params"]]
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)).item()
        require_finite(
            {
                "the context": math.nan if bad else 0.0,
                "the loss": cross_entropy + kept.item(),
                "the gradient norm": norm,
            },
            self._looked_at(after, nats),
            f"step {self.step + 1}",
            world,
        )
        for optimiser in self.optimisers:
            optimiser.step()
        self.context = after
        row = {"loss": total / max(count, 1.0), "gradient_norm": norm}
        if num_chosen:
            row["loss_assistant"] = of_assistant / num_chosen
        return row, round(count)

    def _looked_at(self, after: Tensor, nats: Tensor) -> dict[str, Tensor | None]:
        """Return what may hold the first number that is not finite, in the order of computing."""
        parameters = dict(self.model.named_parameters())
        found = self._weights()
        found |= {f"the context of block {k + 1}": part
                  for k, part in enumerate(after.unbind(1))}  # fmt: skip
        found["the losses of tokens"] = nats
        return found | {f"the gradient of {name}": p.grad for name, p in parameters.items()}

    def num_sweeps(self) -> list[int]:
        """Return the sweeps of each block that gate-scan carried in the last step."""
        inner: Any = getattr(self.objective, "module", self.objective)
        return inner.num_sweeps

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def _warn(self, texts: list[str]) -> None:
        for text in texts:
            self.log({"stage": "warning", "step": self.step, "text": text})
            self.say(f"warning: {text}")

    def look_at_coupling(self) -> None:
        """Warn where the coupling that a cell trains with is above its limit.

        The limit rests on directions that follow the weights; an evaluation takes exact ones.
        """
        for k, cell in enumerate(self.model.cells() if isinstance(self.model, NewLLM) else []):
            if isinstance(cell, ConvexCell):
                q2 = cell.coupling()["q2"]
                self._warn(self.watch.coupling(self.step, k + 1, q2, cell.coupling_limit))

    def forget_engines(self) -> None:
        """Choose engines anew before the next step: the coupling may have grown or shrunk."""
        if self.own is not None:
            self.own.engines = None

    def is_best(self, loss: float) -> bool:
        """Return whether a held-out loss is the lowest so far."""
        if not loss < self.best:
            return False
        self.best = loss
        return True

    def keep_snapshot(self, keep: Snapshot, name: str, about: dict[str, Any]) -> None:
        """Hand over a copy of the model as it is now; the training itself is not touched."""
        assert isinstance(self.model, NewLLM)
        copied = _undivided_copy(self.model)
        self.keeper.world.told(lambda: keep(name, copied, about))

    def save(self) -> None:
        """Keep the state after the last step."""
        world = self.keeper.world
        tensors = {"context": world.gathered(self.context, self.lanes)}
        if self.own is not None and self.own.rows is not None:
            tensors["rows"] = self.own.rows
        values = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "drift": self.drift,
            "best": self.best if math.isfinite(self.best) else None,
            "watch": self.watch.values(),
            "engines": None if self.own is None else self.own.engines,
        }
        state = TrainingState(tensors=tensors, values=values)
        trained = (self.model, self.optimisers)
        self.keeper.save("phase2", f"step {self.step} of Phase 2", trained, state)

    def result(self) -> Phase2Result:
        """Return what was done, and the model that it was done to."""
        with undivided(self.objective):
            fresh = None if self.own is None else self.own.rebuild_rows()
        model = self.model
        if isinstance(model, NewLLM) and any(map(is_divided, model.parameters())):
            model = _undivided_copy(model)
        return Phase2Result(
            model=model,
            num_steps=self.step,
            tokens_seen=self.tokens_seen,
            seconds=self.keeper.spent(),
            drift=self.drift if fresh is None else fresh,
        )


def _undivided_copy(model: NewLLM) -> NewLLM:
    """Return a model with the same weights, whole; all processes must ask."""
    state = {name: whole(value).detach().clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        copied = NewLLM(model.config, model.vocab_size, model.solver)
    copied.load_state_dict(state)
    # a limit rests on directions that follow the weights: exact ones, as evaluation has them
    return copied.to(model.embedding.weight.device).train().eval()
