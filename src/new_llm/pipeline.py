"""The order of the stages and their resume: what `run` does.

    dialogues -> tokens -> Phase 1 -> verdict, gate -> cache -> Phase 2 -> verdicts -> evaluation
              -> sample text -> report

Every stage leaves its result in the run's folder before the next one begins, so that the same
command goes on where the last one stopped. Of several processes all take the same way through the
stages; one of them reads dialogues, judges, and writes all but the shards of the cache.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import cache, phase1, phase2
from .card import write_card
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint, weights_fingerprint
from .config import SEEDS, ModelConfig, RunConfig, to_dict
from .console import Console
from .counts import KneserNey
from .data import Prepared, held_out_ids, open_prepared, prepare
from .dialogues import ReadReport
from .distributed import World, joined
from .doctor import THRESHOLDS
from .errors import CheckpointError, ConfigError, DataError, GateError, StaleCacheError
from .evaluate import (
    evaluate,
    portraits,
    sequence_verdict,
    token_verdict,
    verdict_dict,
)
from .files import alone, disk_error, remove_folder, require_space, sha256, tidy, write_sealed
from .generate import Conversation
from .model import NewLLM, num_parameters
from .records import FORMAT_VERSION, RunFolder, open_folder
from .report import write_report
from .resume import Keeper, synced_length
from .tracking import Tracking

# dialogues whose convergence is shown one by one
_SHOWN_DIALOGUES = 10
# conversations of the sample text, their turns, and dialogues that they are chosen from
_NUM_SAMPLES, _NUM_TURNS, _LOOKED_AT = 3, 3, 50
# between the random seeds of processes
_RANK_STRIDE = 1_000_003
_SEEDS_METRIC = "mse < 0.01"
_STAGES = ("prepare", "phase1", "cache", "phase2", "evaluate")


def choose_device(name: str) -> torch.device:
    """Return the device of a config; `auto` is the first GPU, or the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto, cpu or one here, got {name!r} ({reason})"
        ) from None
    return device


class Run:
    """One run in its folder; each method is a stage that is done at most once."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        console: Console,
        tracking: Tracking | None = None,
        *,
        world: World | None = None,
        device: torch.device | None = None,
        sharded: bool = False,
    ) -> None:
        self.config = config
        self.console = console
        self.tracking = tracking
        self.world = world or World()
        self.device = choose_device(config.device) if device is None else device
        self.sharded = sharded
        self.world.told(lambda: open_folder(out, config) and None)
        self.folder = RunFolder(path=out)
        self.keeper = Keeper(
            self.folder.training,
            seconds=config.phase2.checkpoint_seconds,
            world=self.world,
            owner=config.fingerprint(),
            length=lambda: synced_length(self.folder.history),
        )
        self._prepared: Prepared | None = None

    def tidy(self) -> None:
        """Take away what a killed process left, and what it wrote of work that is done again."""
        self.world.told(lambda: tidy(self.folder.path))

    def _stage(self, name: str) -> dict[str, Any] | None:
        """Return the result of a stage, on all processes alike; None where it is not finished."""

        def read() -> dict[str, Any] | None:
            path = self.folder.stage(name)
            if not path.exists():
                return None
            return self.folder.read(path, f"the result of stage {name}")

        return self.world.told(read)

    @contextmanager
    def _recorded(self, name: str, begun: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield a dict that becomes the stage's result, with its seconds, if all goes well."""
        self.keeper.begin(begun)
        result: dict[str, Any] = {}
        yield result
        result["seconds"] = round(self.keeper.spent(), 3)
        self.world.told(lambda: self.folder.write(self.folder.stage(name), result))

    def _log(self, row: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        try:
            with self.folder.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise disk_error(error, self.folder.history) from error
        if self.tracking is not None:
            self.tracking.log(row)

    def _cut_history(self, length: int) -> None:
        """Drop rows of work that will be done again: all behind so many bytes.

        Raises:
            CheckpointError: the history is shorter.
        """

        def cut() -> None:
            path = self.folder.history
            found = synced_length(path)
            if found < length:
                raise CheckpointError(
                    f"{path} must have {length} bytes at least, as when the training's state was "
                    f"kept, got {found}; put it back, or delete {self.folder.training}"
                )
            if found > length:
                with path.open("rb+") as file:
                    file.truncate(length)

        self.world.told(cut)

    def prepare(self) -> Prepared:
        """Tokenise the dialogues, or open what an earlier call left."""
        if self._prepared is not None:
            return self._prepared
        done = self._stage("prepare")
        begun = time.monotonic()

        read: Prepared | None = None

        def make() -> None:
            nonlocal read
            with self.console.track("tokenising dialogues", None) as advance:
                try:
                    read = prepare(
                        self.config.data,
                        self.folder.data,
                        progress=lambda what, count: advance(count, what),
                    )
                except DataError:
                    if done is None:
                        self._give_back()
                    raise

        # one process reads dialogues, which may lie on its machine alone; all open what it wrote
        self.world.told(make)
        prepared = open_prepared(self.folder.data) if read is None else read
        if done is None:
            with self._recorded("prepare", begun) as result:
                result |= {
                    **prepared.report,
                    "train_tokens": prepared.train.num_tokens,
                    "valid_tokens": prepared.valid.num_tokens,
                    "vocab_size": prepared.tokenizer.vocab_size,
                    "train_fingerprint": prepared.train.fingerprint,
                    "valid_fingerprint": prepared.valid.fingerprint,
                    "tokenizer_fingerprint": prepared.tokenizer.fingerprint,
                }
        self.console.say(
            f"data: {prepared.train.num_tokens:,} tokens in {prepared.train.num_dialogues:,} "
            f"dialogues to train on, {prepared.valid.num_tokens:,} in "
            f"{prepared.valid.num_dialogues:,} held out"
        )
        if self.world.is_main:
            self._say_left_out(prepared.report)
        if self.config.phase2.loss_on == "assistant" and not prepared.train.assistant.any():
            raise DataError(
                "tokens that the assistant says expected, which --phase2.loss-on assistant learns "
                f"from, {self.config.data.source} has none; give other --data or learn from all, "
                "with a new --out"
            )
        self._prepared = prepared
        return prepared

    def _say_left_out(self, report: dict[str, Any]) -> None:
        """Show how many rows were no dialogues: also where no progress is shown."""
        rows = ReadReport(**{part.name: report[part.name] for part in fields(ReadReport)})
        if rows.left_out is not None:
            self.console.show(rows.left_out)
        # of the held-out ones only the number is kept
        if report["num_bad_valid_rows"]:
            count = report["num_bad_valid_rows"]
            self.console.show(f"{count:,} held-out rows are no dialogues and were left out")

    def _give_back(self) -> None:
        """Take away what was begun for dialogues that could not be read."""
        shutil.rmtree(self.folder.data, ignore_errors=True)
        shutil.rmtree(self.folder.stages, ignore_errors=True)
        self.folder.config.unlink(missing_ok=True)
        if not any(self.folder.path.iterdir()):
            self.folder.path.rmdir()

    def _new_model(self) -> NewLLM:
        config = self.config
        prepared = self.prepare()
        shape: ModelConfig = config.model
        if config.phase2.freeze_context:
            # a shared embedding would move under the cached contexts
            shape = replace(shape, tied_readout=False)
        torch.manual_seed(config.seed)
        model = NewLLM(shape, prepared.tokenizer.vocab_size, config.solver).to(self.device)
        if config.phase2.engine == "gate-scan" and not model.cells()[0].separates_gate:
            raise ConfigError(
                f"phase2.engine gate-scan needs a cell whose gate is separate, {shape.cell} has "
                "none; use auto or scan and a new --out"
            )
        return model

    def _load_phase1(self) -> NewLLM:
        return self._load("phase1", self.folder.phase1_checkpoint).model.to(self.device)

    def _load(self, name: str, folder: Path) -> Checkpoint:
        """Return the model that a stage left.

        Raises:
            CheckpointError: it is gone, damaged, or not the one that the stage speaks of.
        """
        stage = self.folder.stage(name)
        again = f"put it back, or delete {stage} to train it again"
        if not folder.exists():
            raise CheckpointError(f"the model of {name} expected in {folder}, it is gone; {again}")
        loaded = load_checkpoint(folder)
        wanted = self.folder.read(stage, f"the result of stage {name}")["weights"]
        found = weights_fingerprint(loaded.model)
        if found != wanted:
            raise CheckpointError(
                f"{folder} must hold the weights {wanted} that stage {name} left, got {found}; "
                f"{again}"
            )
        return loaded

    def phase1(self) -> dict[str, Any]:
        """Train the cells, measure convergence, judge, and check the gate.

        Raises:
            GateError: fewer than 95 % converged, or the strict gate's verdict is not `healthy`.
        """
        done = self._stage("phase1")
        if done is None:
            done = self._train_phase1()
        self.world.told(lambda: self._check_gate(done))
        return done

    def _begin(self, phase: str) -> None:
        """Go back to where the state that is kept of a phase stands, or to its beginning."""
        kept = self.keeper.values()
        if kept is not None and kept["phase"] == phase:
            self._cut_history(kept["history"])
            self.console.say(f"goes on after {kept['at']}")
            return
        before = self._stage("phase1") if phase == "phase2" else None
        self._cut_history(0 if before is None else before["history_bytes"])

    def _train_phase1(self) -> dict[str, Any]:
        config, prepared = self.config, self.prepare()
        model = self._new_model()
        self.console.say(
            f"model: {config.model.cell}, {config.model.num_blocks} block(s), "
            f"{num_parameters(model):,} parameters, {prepared.tokenizer.vocab_size:,} tokens"
        )
        with self._recorded("phase1") as result:
            counts = torch.from_numpy(prepared.train.token_counts(model.vocab_size))
            held_out = held_out_ids(model.vocab_size, config.model.context_width)
            seen = np.setdiff1d(np.flatnonzero(counts.numpy()), held_out)
            ids = torch.from_numpy(seen).to(self.device)
            dialogues = self._first_dialogues(held_out)
            kept = self.keeper.values()
            self._begin("phase1")
            if kept is None:
                untrained = self.world.told(lambda: token_verdict(model).verdict)
                self.console.say(f"verdict before training: {untrained}")
            if self.world.rank:
                # the first goes on with what it drew the weights from
                self._seed(config.seed)
            phase1.train(
                model,
                ids,
                dialogues,
                config.phase1,
                seed=config.seed,
                console=self.console,
                log=self._log,
                keeper=self.keeper,
            )

            def judged() -> dict[str, Any]:
                found = self._convergence(model, counts)
                token, sequence = token_verdict(model), None
                if config.model.scope == "sequence":
                    sequence = sequence_verdict(model, prepared.valid, trained=False)
                save_checkpoint(self.folder.phase1_checkpoint, model, prepared.tokenizer)
                return {
                    **found,
                    "verdict": verdict_dict(token, sequence),
                    "portraits": portraits(token, sequence, counts),
                    "weights": weights_fingerprint(model),
                    "history_bytes": synced_length(self.folder.history),
                }

            result |= self.world.told(judged)
        self._forget_training()
        rate = result["convergence"][_SEEDS_METRIC]["convergence_rate"]
        verdict = result["verdict"]["token"]["verdict"]
        self.console.say(f"{rate:.1%} of tokens converged by {_SEEDS_METRIC}, verdict {verdict}")
        return result

    def _seed(self, seed: int) -> None:
        """Let dropout draw numbers of this process's own, for its share."""
        torch.manual_seed(seed + _RANK_STRIDE * self.world.rank)

    def _forget_training(self) -> None:
        """Take away the state of a phase whose result is kept."""
        self.world.told(lambda: remove_folder(self.folder.training))

    def _first_dialogues(self, held_out: np.ndarray) -> list[np.ndarray]:
        """Return the first dialogues, cut to one sequence, without held-out ids."""
        train = self.prepare().train
        first = range(min(self.config.phase1.literal_dialogues, train.num_dialogues))
        length = self.config.data.sequence_length
        dialogues = [np.asarray(train.dialogue(i)[:length]) for i in first]
        return [ids[~np.isin(ids, held_out)] for ids in dialogues]

    def _convergence(self, model: NewLLM, counts: torch.Tensor) -> dict[str, Any]:
        """Measure convergence by the seeds' metric and by the run's own, over all positions."""
        valid = self.prepare().valid
        counts = counts + torch.from_numpy(valid.token_counts(model.vocab_size))
        ids = counts.nonzero()[:, 0]
        by_seeds = phase1.measure_convergence(model, ids.to(self.device))
        own = phase1.measure_convergence(model, ids.to(self.device), model.solver)
        shown = range(min(_SHOWN_DIALOGUES, valid.num_dialogues))
        return {
            "convergence": {
                _SEEDS_METRIC: by_seeds.summary(counts[ids]),
                f"{model.solver.metric} < {model.solver.tolerance:g}": own.summary(counts[ids]),
            },
            "dialogues": [by_seeds.of_dialogue(valid.dialogue(i)) for i in shown],
            "curve": own.curve.tolist(),
            "iterations": torch.bincount(own.num_iterations).tolist(),
        }

    def _check_gate(self, result: dict[str, Any]) -> None:
        rate = result["convergence"][_SEEDS_METRIC]["convergence_rate"]
        verdict = result["verdict"]["token"]
        advice = "; ".join(verdict["advice"])
        if rate < THRESHOLDS.gate_rate:
            raise GateError(
                f"at least {THRESHOLDS.gate_rate:.0%} of tokens must converge before Phase 2, "
                f"{rate:.1%} did (verdict {verdict['verdict']}); {advice}; use a new --out"
            )
        if self.config.gate == "strict" and verdict["verdict"] != "healthy":
            held = ", ".join(verdict["verdicts"])
            raise GateError(
                f"the strict gate needs the verdict healthy, got {held}; {advice}; "
                "use a new --out, or --gate seed for the documents' own gate"
            )

    def cache(self) -> cache.ContextCache | None:
        """Write the cache that this config needs, or open it."""
        self.phase1()
        model = self._load_phase1()
        per_position = self.config.phase2.freeze_context and self.config.model.scope == "sequence"
        train = self.prepare().train
        key = cache.sequence_key(model, train) if per_position else cache.token_key(model)
        done = self._stage("cache")
        exists = self.world.told(lambda: self.folder.cache.exists())
        num_rows = train.num_tokens if per_position else model.vocab_size
        size = cache.cache_bytes(model, num_rows)
        about = {"num_rows": num_rows, "num_bytes": size, "key": key}
        if exists:
            # a cache that was deleted is written again; a damaged or stale one is refused
            try:
                opened = cache.open_cache(self.folder.cache, key)
            except StaleCacheError:
                if done is not None:
                    raise
            else:
                if done is None:
                    # it was whole, but not told of
                    with self._recorded("cache") as result:
                        result |= about
                return opened
        self.console.say(f"cache: {num_rows:,} rows, {size / 1e6:,.1f} MB")
        with self._recorded("cache") as result, self.console.track("cache", num_rows) as advance:
            folder, world = self.folder.cache, self.world
            if per_position:
                written = cache.write_sequence_cache(folder, model, train, advance, world)
            else:
                written = cache.write_token_cache(folder, model, advance, world)
            result |= about
        return written

    def phase2(self) -> None:
        """Train next-token prediction from the model of Phase 1."""
        written = self.cache()
        if self._stage("phase2") is not None:
            self._forget_training()
            return
        config, prepared = self.config, self.prepare()
        model = self._load_phase1()
        self._begin("phase2")
        with self._recorded("phase2") as result:
            self._seed(config.seed + 1)
            trained = phase2.train(
                model,
                phase2.Phase2Data(
                    train=prepared.train,
                    valid=prepared.valid,
                    segment_length=config.data.sequence_length,
                    cache=written,
                ),
                config.phase2,
                seed=config.seed,
                phase1=config.phase1,
                console=self.console,
                log=self._log,
                keeper=self.keeper,
                snapshots=phase2.Snapshots(
                    keep=self._keep_snapshot,
                    best=config.snapshots.best,
                    every=config.snapshots.every,
                ),
                sharded=self.sharded,
            )
            model = trained.model
            assert isinstance(model, NewLLM)
            model.eval()

            def kept() -> dict[str, Any]:
                save_checkpoint(self.folder.checkpoint, model, prepared.tokenizer)
                synced_length(self.folder.history)
                return {
                    "num_steps": trained.num_steps,
                    "tokens_seen": trained.tokens_seen,
                    "drift": trained.drift,
                    "weights": weights_fingerprint(model),
                    "history": sha256(self.folder.history),
                }

            result |= self.world.told(kept)
        self._forget_training()

    def _keep_snapshot(self, name: str, model: NewLLM, about: dict[str, Any]) -> None:
        """Write a model of Phase 2 as a checkpoint of its own."""
        folder = self.folder.snapshots / name
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        require_space(self.folder.path, size)
        save_checkpoint(folder, model, self.prepare().tokenizer)
        write_sealed(folder / "snapshot.json", about, version=FORMAT_VERSION)

    def finish(self) -> dict[str, Any]:
        """Judge and evaluate the final model, write text, result and report."""
        self.phase2()
        config, prepared = self.config, self.prepare()
        if self._stage("evaluate") is None:
            loaded = self._load("phase2", self.folder.checkpoint)
            model = loaded.model.to(self.device)
            with self._recorded("evaluate") as result:
                with self.console.track("evaluation", prepared.valid.num_tokens) as advance:
                    evaluation = evaluate(
                        model,
                        prepared.valid,
                        segment_length=config.data.sequence_length,
                        advance=advance,
                        world=self.world,
                    )

                def judged() -> dict[str, Any]:
                    bigram = KneserNey(prepared.train, model.vocab_size, 2).loss(prepared.valid)
                    token, sequence = token_verdict(model), None
                    if config.model.scope == "sequence":
                        sequence = sequence_verdict(model, prepared.valid, trained=True)
                    counts = torch.from_numpy(prepared.train.token_counts(model.vocab_size))
                    return {
                        "evaluation": evaluation.to_dict(),
                        "bigram_loss": bigram,
                        "verdict": verdict_dict(token, sequence),
                        "portraits": portraits(token, sequence, counts),
                        "samples": self._samples(loaded),
                    }

                result |= self.world.told(judged)
        return self.world.told(self._write_result)

    def _samples(self, loaded: Checkpoint) -> list[list[dict[str, str]]]:
        """Hold a few conversations: a held-out dialogue's user speaks, the model answers."""
        valid = self.prepare().valid
        said = [
            [m["content"] for m in loaded.tokenizer.decode_dialogue(valid.dialogue(i))
             if m["role"] == "user" and m["content"].strip()]
            for i in range(min(_LOOKED_AT, valid.num_dialogues))
        ]  # fmt: skip
        # longer ones first: they show whether anything is remembered
        said.sort(key=lambda turns: -min(len(turns), _NUM_TURNS))
        samples = []
        for number, turns in enumerate(said[:_NUM_SAMPLES]):
            # each turn of a conversation adds one
            seed = self.config.sample.seed + number * (_NUM_TURNS + 1)
            drawn = replace(self.config.sample, seed=seed % SEEDS)
            conversation = Conversation(loaded, drawn)
            samples.append(
                [
                    {"user": text, "assistant": "".join(conversation.reply(text)).strip()}
                    for text in turns[:_NUM_TURNS]
                ]
            )
        return samples

    def whole(self) -> dict[str, Any]:
        """Do what is left of the run; of a finished one return the result."""

        def finished() -> dict[str, Any] | None:
            if not self.folder.result.exists():
                return None
            result = self.folder.read(self.folder.result, "a run's result")
            if not self.folder.report.exists():
                write_report([self.folder.path], self.folder.report)
            return result

        return self.world.told(finished) or self.finish()

    def _write_result(self) -> dict[str, Any]:
        stages = {
            name: self.folder.read(self.folder.stage(name), f"the result of stage {name}")
            for name in _STAGES
        }
        result = {
            "fingerprint": self.config.fingerprint(),
            "verdict_phase1": stages["phase1"]["verdict"],
            "verdict_final": stages["evaluate"]["verdict"],
            "evaluation": stages["evaluate"]["evaluation"],
            "bigram_loss": stages["evaluate"]["bigram_loss"],
            "tokens_seen": stages["phase2"]["tokens_seen"],
            "seconds": {name: stages[name]["seconds"] for name in _STAGES},
            "convergence": stages["phase1"]["convergence"],
            "samples": stages["evaluate"]["samples"],
        }
        final = self._load("phase2", self.folder.checkpoint)
        write_card(
            self.folder.checkpoint,
            contraction=final.config["contraction"],
            num_parameters=num_parameters(final.model),
            run=self.config,
            result=result,
            prepared=stages["prepare"],
        )
        write_report([self.folder.path], self.folder.report, result=result)
        self.folder.write(self.folder.result, result)
        return result


def run(
    config: RunConfig,
    out: Path,
    *,
    console: Console | None = None,
    trackers: Sequence[str] = (),
    sharded: bool = False,
) -> dict[str, Any]:
    """Do the whole job and return what `result.json` holds; resumes an unfinished folder.

    Args:
        config: of the run.
        out: its folder.
        console: for progress; None shows none.
        trackers: names of `tracking.TRACKERS` that are handed the run's numbers too.
        sharded: of several processes, each keeps a part of the model in Phase 2 (FSDP2).

    Raises:
        NewLLMError: a user's mistake, or a run that had to stop itself.
    """
    console = console or Console(quiet=True)
    with opened(config, out, console, trackers, sharded=sharded) as job:
        return job.whole()


@contextmanager
def opened(
    config: RunConfig,
    out: Path,
    console: Console,
    trackers: Sequence[str] = (),
    *,
    sharded: bool = False,
) -> Iterator[Run]:
    """Yield a run that this process, or those of a launcher, have to themselves.

    Raises:
        CheckpointError: the folder is another config's, or another process works in it.
        LostProcessError: one of several processes is gone.
    """
    with joined(config.device) as (world, device), ExitStack() as stack:
        if not world.is_main:
            console = Console(quiet=True)
        job = Run(config, out, console, world=world, device=device, sharded=sharded)
        world.told(lambda: stack.enter_context(alone(out)))
        job.tidy()
        # a finished one has nothing to hand over
        shown = () if job.folder.result.exists() or not world.is_main else trackers
        with Tracking(shown, job.folder.tracking, to_dict(config)) as tracking:
            job.tracking = tracking
            yield job
