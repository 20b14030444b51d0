"""The order of the stages and their resume: what `run` does.

    dialogues -> tokens -> Phase 1 -> verdict, gate -> cache -> Phase 2 -> verdicts -> evaluation
              -> sample text -> report

Every stage leaves its result in the run's folder before the next one begins, so that the same
command goes on where the last one stopped.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import cache, phase1, phase2
from .card import write_card
from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_training_values,
    save_checkpoint,
    weights_fingerprint,
)
from .config import SEEDS, ModelConfig, RunConfig, to_dict
from .console import Console
from .counts import KneserNey
from .data import Prepared, held_out_ids, prepare
from .doctor import THRESHOLDS
from .errors import CheckpointError, ConfigError, DataError, GateError
from .evaluate import (
    evaluate,
    portraits,
    sequence_verdict,
    token_verdict,
    verdict_dict,
)
from .files import disk_error, read_object, understood, write_json, write_text
from .generate import Conversation
from .model import NewLLM, num_parameters
from .records import open_folder, read_history
from .report import write_report
from .tracking import Tracking

# dialogues whose convergence is shown one by one
_SHOWN_DIALOGUES = 10
# conversations of the sample text, their turns, and dialogues that they are chosen from
_NUM_SAMPLES, _NUM_TURNS, _LOOKED_AT = 3, 3, 50
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
        self, config: RunConfig, out: Path, console: Console, tracking: Tracking | None = None
    ) -> None:
        self.config = config
        self.console = console
        self.tracking = tracking
        self.device = choose_device(config.device)
        self.folder = open_folder(out, config)
        self._prepared: Prepared | None = None

    def _stage(self, name: str) -> dict[str, Any] | None:
        path = self.folder.stages / f"{name}.json"
        return read_object(path, f"the result of stage {name}") if path.exists() else None

    @contextmanager
    def _recorded(self, name: str, begun: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield a dict that becomes the stage's result, with its seconds, if all goes well."""
        begun = time.monotonic() if begun is None else begun
        result: dict[str, Any] = {}
        yield result
        result["seconds"] = round(time.monotonic() - begun, 3)
        write_json(self.folder.stages / f"{name}.json", result)

    def _log(self, row: dict[str, Any]) -> None:
        try:
            with self.folder.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise disk_error(error, self.folder.history) from error
        if self.tracking is not None:
            self.tracking.log(row)

    def _truncate_history(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop rows of work that will be done again."""
        rows = [row for row in read_history(self.folder.history) if keep(row)]
        if self.folder.history.exists():
            write_text(self.folder.history, "".join(json.dumps(row) + "\n" for row in rows))

    def prepare(self) -> Prepared:
        """Tokenise the dialogues, or open what an earlier call left."""
        if self._prepared is not None:
            return self._prepared
        done = self._stage("prepare")
        begun = time.monotonic()
        with self.console.track("tokenising dialogues", None) as advance:
            try:
                prepared = prepare(
                    self.config.data,
                    self.folder.data,
                    progress=lambda what, count: advance(count, what),
                )
            except DataError:
                if done is None:
                    self._give_back()
                raise
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
        self._prepared = prepared
        return prepared

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
        return NewLLM(shape, prepared.tokenizer.vocab_size, config.solver).to(self.device)

    def _load_phase1(self) -> NewLLM:
        folder = self.folder.phase1_checkpoint
        if not folder.exists():
            raise CheckpointError(
                f"the model of Phase 1 expected in {folder}, but it is gone; "
                f"delete {self.folder.stages / 'phase1.json'} to train it again"
            )
        return load_checkpoint(folder).model.to(self.device)

    def phase1(self) -> dict[str, Any]:
        """Train the cells, measure convergence, judge, and check the gate.

        Raises:
            GateError: fewer than 95 % converged, or the strict gate's verdict is not `healthy`.
        """
        done = self._stage("phase1")
        if done is None:
            self._truncate_history(lambda row: False)
            done = self._train_phase1()
        with understood(self.folder.stages / "phase1.json", "the result of stage phase1"):
            self._check_gate(done)
        return done

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
            self.console.say("verdict before training: " + token_verdict(model).verdict)
            phase1.train(
                model,
                ids,
                dialogues,
                config.phase1,
                seed=config.seed,
                console=self.console,
                log=self._log,
            )
            result |= self._convergence(model, counts)
            token = token_verdict(model)
            sequence = None
            if config.model.scope == "sequence":
                sequence = sequence_verdict(model, prepared.valid, trained=False)
            result["verdict"] = verdict_dict(token, sequence)
            result["portraits"] = portraits(token, sequence, counts)
            result["weights"] = weights_fingerprint(model)
            save_checkpoint(self.folder.phase1_checkpoint, model, prepared.tokenizer)
        rate = result["convergence"][_SEEDS_METRIC]["convergence_rate"]
        verdict = result["verdict"]["token"]["verdict"]
        self.console.say(f"{rate:.1%} of tokens converged by {_SEEDS_METRIC}, verdict {verdict}")
        return result

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
        # a cache that was deleted is written again; a damaged or stale one is refused
        if self._stage("cache") is not None and self.folder.cache.exists():
            return cache.open_cache(self.folder.cache, key)
        num_rows = train.num_tokens if per_position else model.vocab_size
        size = cache.cache_bytes(model, num_rows)
        self.console.say(f"cache: {num_rows:,} rows, {size / 1e6:,.1f} MB")
        with self._recorded("cache") as result, self.console.track("cache", num_rows) as advance:
            if per_position:
                written = cache.write_sequence_cache(self.folder.cache, model, train, advance)
            else:
                written = cache.write_token_cache(self.folder.cache, model, advance)
            result |= {"num_rows": num_rows, "num_bytes": size, "key": key}
        return written

    def phase2(self) -> None:
        """Train next-token prediction from the model of Phase 1."""
        written = self.cache()
        if self._stage("phase2") is not None:
            return
        config, prepared = self.config, self.prepare()
        model = self._load_phase1()
        training = self.folder.training
        step = read_training_values(training)["step"] if training.is_dir() else 0
        self._truncate_history(lambda row: row["stage"].startswith("phase1") or row["step"] <= step)
        if step:
            self.console.say(f"phase 2 goes on after step {step}")
        with self._recorded("phase2") as result:
            torch.manual_seed(config.seed + 1)
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
                folder=self.folder.training,
                console=self.console,
                log=self._log,
            )
            model.eval()
            save_checkpoint(self.folder.checkpoint, model, prepared.tokenizer)
            result |= {
                "num_steps": trained.num_steps,
                "tokens_seen": trained.tokens_seen,
                "drift": trained.drift,
                "weights": weights_fingerprint(model),
            }
        shutil.rmtree(self.folder.training, ignore_errors=True)

    def finish(self) -> dict[str, Any]:
        """Judge and evaluate the final model, write text, result and report."""
        self.phase2()
        config, prepared = self.config, self.prepare()
        if self._stage("evaluate") is None:
            loaded = load_checkpoint(self.folder.checkpoint)
            model = loaded.model.to(self.device)
            with self._recorded("evaluate") as result:
                with self.console.track("evaluation", prepared.valid.num_tokens) as advance:
                    evaluation = evaluate(
                        model,
                        prepared.valid,
                        segment_length=config.data.sequence_length,
                        advance=advance,
                    )
                bigram = KneserNey(prepared.train, model.vocab_size, 2).loss(prepared.valid)
                token = token_verdict(model)
                sequence = None
                if config.model.scope == "sequence":
                    sequence = sequence_verdict(model, prepared.valid, trained=True)
                counts = torch.from_numpy(prepared.train.token_counts(model.vocab_size))
                result |= {
                    "evaluation": evaluation.to_dict(),
                    "bigram_loss": bigram,
                    "verdict": verdict_dict(token, sequence),
                    "portraits": portraits(token, sequence, counts),
                    "samples": self._samples(loaded),
                }
        return self._write_result()

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

    def _write_result(self) -> dict[str, Any]:
        stages = {name: self._stage(name) or {} for name in _STAGES}
        final = load_checkpoint(self.folder.checkpoint)
        with understood(self.folder.stages, "the results of a run's stages"):
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
            write_card(
                self.folder.checkpoint,
                contraction=final.config["contraction"],
                num_parameters=num_parameters(final.model),
                run=self.config,
                result=result,
                prepared=stages["prepare"],
            )
        write_report([self.folder.path], self.folder.report, result=result)
        write_json(self.folder.result, result)
        return result


def run(
    config: RunConfig,
    out: Path,
    *,
    console: Console | None = None,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Do the whole job and return what `result.json` holds; resumes an unfinished folder.

    Args:
        config: of the run.
        out: its folder.
        console: for progress; None shows none.
        trackers: names of `tracking.TRACKERS` that are handed the run's numbers too.

    Raises:
        NewLLMError: a user's mistake, or a run that had to stop itself.
    """
    with tracked(config, out, console or Console(quiet=True), trackers) as job:
        if job.folder.result.exists():
            result = read_object(job.folder.result, "a run's result")
            if not job.folder.report.exists():
                write_report([out], job.folder.report)
            return result
        return job.finish()


@contextmanager
def tracked(
    config: RunConfig, out: Path, console: Console, trackers: Sequence[str] = ()
) -> Iterator[Run]:
    """Yield a run whose numbers trackers are handed; a finished one has nothing to hand over."""
    job = Run(config, out, console)
    left = () if job.folder.result.exists() else trackers
    with Tracking(left, job.folder.tracking, to_dict(config)) as tracking:
        job.tracking = tracking
        yield job
