"""The configuration of a whole run: frozen dataclasses, presets, validation, fingerprint.

The only place where a default stands. Imports no torch, so that the command line starts fast.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError, shown

CellName = Literal["sequential", "layerwise", "convex"]
# entry points of installed packages, name to a class or function that takes a `ModelConfig`
CELL_GROUP = "new_llm.cells"
MetricName = Literal["residual", "mse", "l2"]
T = TypeVar("T")
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
          type(None): "none"}  # fmt: skip
# random generators take more, but a seed is drawn from by adding to it
SEEDS = 2**31
# float32 holds its products with the optimiser's corrections
_LARGEST = 1e30


def _require(owner: object, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        section = _SECTION.get(type(owner).__name__, "")
        given = getattr(owner, name)
        raise ConfigError(
            f"{section}{name} must be {wanted}, got {shown(given)}; change that option"
        )


def _check_choices(owner: Any) -> None:
    """Check every field: its type, `Literal` ones against their values, numbers to be finite."""
    for name, hint in get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            _require(owner, name, value in choices, "one of " + ", ".join(map(str, choices)))
            continue
        if dataclasses.is_dataclass(hint):
            continue
        # beside a `Literal` any text may stand: the field's own rule says which
        kinds = tuple(k for k in get_args(hint) or (hint,) if get_origin(k) is not Literal)
        # a whole number may stand for a number, but a truth value for neither
        wider = (*kinds, int) if float in kinds else kinds
        fits = isinstance(value, wider) and (bool in kinds or not isinstance(value, bool))
        _require(owner, name, fits, " or ".join(_KINDS[kind] for kind in kinds))
        if float in kinds and value is not None:
            # a whole number of JSON may have more digits than any float
            _require(owner, name, abs(value) <= sys.float_info.max, "a finite number")
        elif isinstance(value, int) and name != "seed":  # whose own range is named below
            _require(owner, name, abs(value) < 1 << 63, "a whole number of 64 bits")


def _check_cell(name: str) -> None:
    """Check that a cell is ours or registered; its code is imported when a model is built."""
    ours = get_args(CellName)
    if name in ours:
        return
    # costs as much time as all of this module, and only cells of others need it
    from importlib.metadata import entry_points

    registered = entry_points(group=CELL_GROUP).names
    if name not in registered:
        known = ", ".join([*ours, *sorted(registered - {*ours})])
        raise ConfigError(
            f"model.cell must be one of {known}, got {name!r}; change that option, or install the "
            f"package that registers it as an entry point of {CELL_GROUP}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model. `vocab_size` is not here: the tokenizer decides it."""

    cell: CellName | str = "convex"
    """Which gated network updates the context: ours, or one that a package registers."""
    scope: Literal["token", "sequence"] = "sequence"
    """Contexts from zero for every token (the seeds), or carried through the text."""
    num_blocks: int = 2
    """Blocks, each with one cell and one context of its own."""
    num_layers: int = 1
    """Layers inside one seed cell; ConvexCell has exactly one."""
    context_width: int = 256
    """Width C of a context."""
    embedding_width: int = 256
    """Width E of a token embedding."""
    hidden_width: int = 256
    """Width H inside a cell."""
    mlp_width: int = 256
    """Hidden width of a block's residual gated MLP; 0 leaves the MLP out."""
    dropout: float = 0.0
    """Dropout after each hidden layer of a seed cell."""
    clip: float | None = None
    """Clamp contexts of a seed cell to [-clip, clip]; only the clipping experiment uses it."""
    initialisation: Literal["normal", "torch", "orthogonal"] = "orthogonal"
    """Seed cells: N(0, 0.02) with zero biases (the seeds), PyTorch's default, or orthogonal."""
    activation: Literal["elu", "silu", "gelu", "tanh"] = "elu"
    """Activation of ConvexCell, of known Lipschitz constant and with a continuous slope."""
    coupling_limit: float = 0.95
    """ConvexCell keeps q2 = Lip(phi) * norm2(W_d) * norm2(W_c) under this; 0 means W_c = 0."""
    certified: bool = False
    """ConvexCell keeps q_inf under the limit too, which proves that gate-scan contracts."""
    forget_max: float = 0.999
    """Largest value of ConvexCell's forget gate."""
    longest_timescale: float = 100.0
    """Slowest initial time-scale of ConvexCell's gates, tokens; the fastest is 1."""
    tied_readout: bool = True
    """Whether the read-out shares the embedding matrix; freezing contexts needs its own."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_cell(self.cell)
        for name in ("num_blocks", "num_layers"):
            _require(self, name, 1 <= getattr(self, name) <= 64, "in [1, 64]")
        for name in ("context_width", "embedding_width", "hidden_width"):
            _require(self, name, 2 <= getattr(self, name) <= 16384, "in [2, 16384]")
        _require(self, "mlp_width", 0 <= self.mlp_width <= 65536, "in [0, 65536]")
        _require(self, "dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        _require(self, "clip", self.clip is None or self.clip > 0.0, "positive, or none")
        _require(self, "coupling_limit", 0.0 <= self.coupling_limit <= 100.0, "in [0, 100]")
        _require(self, "forget_max", 0.0 < self.forget_max < 1.0, "in (0, 1)")
        _require(self, "longest_timescale", self.longest_timescale > 1.0, "above 1 token")
        if self.cell == "convex":
            _require(self, "num_layers", self.num_layers == 1, "1 for the convex cell")
            _require(self, "dropout", self.dropout == 0.0, "0 for the convex cell")
            _require(self, "clip", self.clip is None, "none for the convex cell")
        if self.certified:
            _require(self, "certified", self.cell == "convex", "for the convex cell only")
            _require(self, "coupling_limit", self.coupling_limit < 1.0, "below 1, if certified")
        if self.scope == "token":
            _require(self, "num_blocks", self.num_blocks == 1, "1 in token scope")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """Shape of a peer: the blocks of ours with another recurrence inside."""

    kind: Literal["lstm", "gru", "mingru", "gpt", "mamba"]
    """What carries the past."""
    num_blocks: int = 2
    """Blocks."""
    embedding_width: int = 256
    """Width E of a token embedding and of the stream."""
    width: int = 256
    """Width of what is carried; of `gpt` it is E, of `mamba` the numbers a channel."""
    mlp_width: int = 336
    """Hidden width of a block's residual gated MLP; 0 leaves the MLP out."""
    num_heads: int = 4
    """Attention heads, `gpt`."""
    window: int = 512
    """Positions that attention reaches, `gpt`."""
    longest_timescale: float | None = 100.0
    """Slowest unit's memory at the start, in tokens, `lstm`, `gru` and `mingru`; none leaves their
    gates as is usual for them."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "num_blocks", 1 <= self.num_blocks <= 64, "in [1, 64]")
        for name in ("embedding_width", "width", "num_heads", "window"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "mlp_width", self.mlp_width >= 0, "at least 0")
        slowest = self.longest_timescale
        _require(self, "longest_timescale", slowest is None or 1.0 <= slowest <= 1e6, "in [1, 1e6]")
        if self.kind == "gpt":
            _require(self, "width", self.width == self.embedding_width, "embedding_width for gpt")
            _require(self, "num_heads", self.embedding_width % (2 * self.num_heads) == 0,
                     "a divisor of embedding_width / 2")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where dialogues come from and how they become tokens."""

    source: str = "chitchat-dataset"
    """JSONL or Parquet file, hub name, or `chitchat-dataset` (the default package); several with
    commas between them."""
    split: str = "train_sft"
    """Split, where the source is a hub name."""
    valid: str | None = None
    """Held-out dialogues, in the same forms; none takes them from `source` by hash."""
    valid_split: str = "test_sft"
    """Split of `valid`, where that is a hub name."""
    valid_fraction: float = 0.05
    """Share of dialogues held out by hash, where `valid` is not given."""
    tokenizer: str = "bpe"
    """`bpe` (trained on the data), `gpt2`, or a Hugging Face tokenizer's folder or hub name."""
    vocab_size: int = 8192
    """Size of a trained `bpe` vocabulary, its two role tokens included."""
    sequence_length: int = 128
    """Tokens of one segment."""
    max_dialogues: int | None = None
    """Read at most this many dialogues of the source."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that is not a dialogue does: stop, or be counted and left out."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "source", bool(self.source), "a path or a name")
        _require(self, "tokenizer", bool(self.tokenizer), "a path or a name")
        _require(self, "valid_fraction", 0.0 < self.valid_fraction < 1.0, "in (0, 1)")
        _require(self, "vocab_size", 300 <= self.vocab_size <= 1_000_000, "in [300, 1000000]")
        _require(self, "sequence_length", 2 <= self.sequence_length <= 1 << 20, "in [2, 1048576]")
        dialogues = self.max_dialogues
        _require(self, "max_dialogues", dialogues is None or dialogues >= 1, "at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """The stop rule of a token-scope search: which contexts are delivered."""

    metric: MetricName = "residual"
    """What is compared with the tolerance: relative change, mean squared, or L2 norm."""
    tolerance: float = 1e-5
    """Converged where the metric is below this."""
    max_iterations: int = 200
    """Cap on iterations a token."""
    warmup: int = 0
    """Iterations before convergence is looked at."""
    damping: float = 0.0
    """Share of the old context kept in each iteration."""
    method: Literal["picard", "anderson"] = "picard"
    """Plain iteration, or Anderson acceleration."""
    distance: float | None = None
    """Tokens whose estimated relative distance to the fixed point is above this are iterated on in
    double precision; none leaves them where the tolerance was met."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "tolerance", self.tolerance > 0.0, "positive")
        _require(self, "max_iterations", 1 <= self.max_iterations <= 1_000_000, "in [1, 1000000]")
        _require(self, "warmup", 0 <= self.warmup < self.max_iterations, "in [0, max_iterations)")
        _require(self, "damping", 0.0 <= self.damping < 1.0, "in [0, 1)")
        if self.distance is not None:
            _require(self, "distance", self.distance > 0.0, "positive, or none")
            _require(self, "metric", self.metric == "residual", "residual, if distance is given")


@dataclass(frozen=True, kw_only=True)
class Phase1Config:
    """Phase 1: train the cell until iterating it settles."""

    objective: Literal["residual", "repetition", "contractive"] = "contractive"
    """The seeds' two objectives, or ours."""
    epochs: int = 3
    """Passes of `residual` over its tokens."""
    literal_dialogues: int = 0
    """Dialogues that `residual` first visits token by token, as the seeds did."""
    learning_rate: float = 1e-3
    """Step size of Adam, batched forms."""
    final_learning_rate: float = 0.05
    """`contractive`: share of the learning rate that the cosine ends at."""
    literal_learning_rate: float = 1e-4
    """Step size of Adam, literal loop."""
    max_iterations: int = 50
    """Inner iterations a token, `residual`."""
    threshold: float = 0.01
    """Inner iterations stop where the mean squared change is below this, `residual`."""
    warmup_iterations: int = 0
    """Inner iterations before the threshold is looked at, `residual`."""
    residual_loss: Literal["each", "last"] = "each"
    """`residual`: a step after each inner iteration, or one after the last."""
    max_steps: int | None = 300
    """Most optimiser steps of the batched forms; none is as many as the epochs need."""
    batch_size: int = 256
    """Token ids, or phrases, a step."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    contraction_target: float = 0.7
    """`contractive`: ratio of context pairs above which the hinge pulls."""
    spread_steps: int = 0
    """`contractive`: first steps that train the spread of contexts only, without the hinge."""
    visited_iterations: int = 24
    """`contractive`: most iterations before the contexts of a step; each step draws its number."""
    hinge_weight: float = 10.0
    """`contractive`: weight of the hinge on ratios of context pairs."""
    residual_weight: float = 1.0
    """`contractive`: weight of the residual at visited contexts."""
    variance_weight: float = 1.0
    """`contractive`: weight of the VICReg variance term."""
    covariance_weight: float = 0.04
    """`contractive`: weight of the VICReg covariance term."""
    cycle_length: int = 4
    """`repetition`: tokens of a phrase."""
    num_cycles: int = 8
    """`repetition`: how often a phrase is repeated."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "epochs", 1 <= self.epochs <= 100_000, "in [1, 100000]")
        _require(self, "literal_dialogues", self.literal_dialogues >= 0, "at least 0")
        for name in ("learning_rate", "literal_learning_rate", "threshold", "gradient_clip"):
            _require(self, name, 0.0 < getattr(self, name) <= _LARGEST, f"in (0, {_LARGEST:g}]")
        _require(self, "final_learning_rate", 0.0 <= self.final_learning_rate <= 1.0, "in [0, 1]")
        _require(self, "max_iterations", 1 <= self.max_iterations <= 100_000, "in [1, 100000]")
        warmup = self.warmup_iterations
        _require(self, "warmup_iterations", 0 <= warmup < self.max_iterations,
                 "in [0, max_iterations)")  # fmt: skip
        steps = self.max_steps
        _require(self, "max_steps", steps is None or steps >= 1, "at least 1, or none")
        _require(self, "batch_size", 2 <= self.batch_size <= 1 << 20, "in [2, 1048576]")
        _require(self, "contraction_target", 0.0 < self.contraction_target < 1.0, "in (0, 1)")
        _require(self, "spread_steps", self.spread_steps >= 0, "at least 0")
        visited = self.visited_iterations
        _require(self, "visited_iterations", 1 <= visited <= 100_000, "in [1, 100000]")
        for name in ("hinge_weight", "residual_weight", "variance_weight", "covariance_weight"):
            _require(self, name, getattr(self, name) >= 0.0, "at least 0")
        _require(self, "cycle_length", 1 <= self.cycle_length <= 65536, "in [1, 65536]")
        _require(self, "num_cycles", 2 <= self.num_cycles <= 65536, "in [2, 65536]")


@dataclass(frozen=True, kw_only=True)
class Phase2Config:
    """Phase 2: train next-token prediction."""

    freeze_context: bool = False
    """Train the read-out only, on cached contexts."""
    loss_on: Literal["all", "assistant"] = "all"
    """Which tokens are in the loss; both losses are always reported."""
    epochs: float = 1.0
    """Passes over the training tokens."""
    min_steps: int = 400
    """Fewest optimiser steps: a small corpus is read again until then."""
    max_steps: int | None = None
    """Most optimiser steps; none is as many as the epochs need."""
    batch_size: int = 16
    """Segments a step."""
    optimiser: Literal["muon", "adamw"] = "muon"
    """What moves the matrices of layers; embeddings, gains and biases move by AdamW."""
    muon_precision: Literal["auto", "float32"] = "auto"
    """Precision in which Muon orthogonalises: `auto` is bfloat16 where its products are fast; in
    `float32` any number of processes trains alike."""
    learning_rate: float = 6e-3
    """Peak step size."""
    final_learning_rate: float = 0.05
    """Share of the peak that the cosine ends at."""
    warmup_steps: int = 50
    """Steps of linear warm-up; never more than a tenth of all."""
    weight_decay: float = 0.1
    """Decay of matrices; embeddings, norms and biases have none."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    pair_hinge: float = 0.0
    """Weight of the contraction hinge on pairs of contexts, kept from Phase 1."""
    contractive: float = 0.0
    """Weight of Phase 1's `contractive` objective, kept on a sample of single tokens."""
    contractive_every: int = 4
    """Steps between two of its samples, each of which weighs as much more; blocks take turns."""
    engine: Literal["auto", "scan", "gate-scan", "jacobi"] = "auto"
    """How contexts are carried through a text; `auto` measures the coupling and says why."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the large matrix products; contexts are float32 always."""
    loss_chunk: int = 1024
    """Positions projected to the vocabulary at once."""
    evaluations: int = 5
    """Evaluations on held-out dialogues while training, evenly spaced."""
    evaluation_tokens: int = 32768
    """Held-out tokens of one evaluation while training; the last one takes all."""
    checkpoint_seconds: float = 120.0
    """Seconds between resumable training states."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "epochs", self.epochs > 0.0, "positive")
        steps = self.max_steps
        _require(self, "max_steps", steps is None or steps >= 1, "at least 1, or none")
        for name in ("batch_size", "loss_chunk", "evaluation_tokens", "contractive_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "gradient_clip"):
            _require(self, name, 0.0 < getattr(self, name) <= _LARGEST, f"in (0, {_LARGEST:g}]")
        _require(self, "final_learning_rate", 0.0 <= self.final_learning_rate <= 1.0, "in [0, 1]")
        for name in ("min_steps", "warmup_steps", "evaluations"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("weight_decay", "pair_hinge", "contractive", "checkpoint_seconds"):
            _require(self, name, getattr(self, name) >= 0.0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How text is drawn, in the run's own sample and in `generate` and `chat`."""

    max_new_tokens: int = 60
    """Most tokens drawn."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 50
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the most likely tokens that hold this share of probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits (multiplies negative ones) of tokens already drawn."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        _require(self, "temperature", self.temperature >= 0.0, "at least 0")
        # float32 holds logits that were divided by these
        holds = self.temperature == 0.0 or 1e-6 <= self.temperature <= 1e6
        _require(self, "temperature", holds, "0, or in [1e-6, 1e6]")
        _require(self, "top_k", self.top_k >= 0, "at least 0")
        _require(self, "top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        holds = 1e-6 <= self.repetition_penalty <= 1e6
        _require(self, "repetition_penalty", holds, "in [1e-6, 1e6]")
        _require(self, "seed", 0 <= self.seed < SEEDS, f"in [0, {SEEDS})")


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """Which models of Phase 2 are kept beside the last, in `DIR/snapshots`."""

    best: bool = False
    """That of the lowest loss on held-out dialogues while training."""
    every: int | None = None
    """One each so many steps; none keeps none."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "every", self.every is None or self.every >= 1, "at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the result of a run.

    >>> RunConfig(solver=SolverConfig(damping=1.5))
    Traceback (most recent call last):
    new_llm.errors.ConfigError: solver.damping must be in [0, 1), got 1.5; change that option
    """

    preset: str = "convex"
    """Name of the preset that this started from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dialogues and tokens."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Stop rule of the search."""
    phase1: Phase1Config = field(default_factory=Phase1Config)
    """Training of the cell."""
    phase2: Phase2Config = field(default_factory=Phase2Config)
    """Training of next-token prediction."""
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    """Models that are kept on the way."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """The sample text of a run."""
    gate: Literal["strict", "seed"] = "strict"
    """Phase 2 starts from a `healthy` verdict, or from the seeds' own 95 % alone."""
    seed: int = 0
    """Seed of weights, order and draws."""
    device: str = "auto"
    """`auto`, `cpu`, or a CUDA device such as `cuda:0`."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self, "seed", 0 <= self.seed < SEEDS, f"in [0, {SEEDS})")
        if self.model.cell in ("sequential", "layerwise"):
            known = self.phase2.engine != "gate-scan"
            _require(self.phase2, "engine", known, "auto, scan or jacobi for a seed cell")

    def fingerprint(self) -> str:
        """Return 16 hex digits that two configs share exactly if all their settings are equal."""
        return fingerprint(to_dict(self))


_SECTION = {
    "ModelConfig": "model.",
    "DataConfig": "data.",
    "SolverConfig": "solver.",
    "Phase1Config": "phase1.",
    "Phase2Config": "phase2.",
    "SnapshotConfig": "snapshots.",
    # `generate`, `chat`, `ui` and requests name its fields without a section
    "SampleConfig": "",
}


def fingerprint(value: Any) -> str:
    """Return 16 hex digits of SHA-256 over the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts by their dotted names; what is no number is text.

    >>> dict(flat({"a": {"b": 1, "c": None}, "d": 0.5}))
    {'a.b': 1, 'a.c': 'None', 'd': 0.5}
    """
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float) else str(value)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Build a config from JSON values; an unknown or missing key is an error.

    >>> from_dict(SampleConfig, {"temprature": 1.0})
    Traceback (most recent call last):
    new_llm.errors.ConfigError: SampleConfig knows no 'temprature'; it has max_new_tokens, ...
    """
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} needs names and values, got {shown(values)}")
    for name in values:
        if name not in hints:
            known = ", ".join(hints)
            raise ConfigError(f"{cls.__name__} knows no {shown(name)}; it has {known}")
    built = {
        name: from_dict(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
        for name, value in values.items()
    }
    return cls(**built)


def scaled(model: ModelConfig, width: int) -> ModelConfig:
    """Return a shape whose context has another width, and all inner widths in proportion.

    >>> scaled(preset("convex").model, 64).hidden_width
    48
    """
    share = width / model.context_width
    names = ("context_width", "embedding_width", "hidden_width", "mlp_width")
    return replace(model, **{name: round(getattr(model, name) * share) for name in names})


def _seed_preset(name: str, cell: CellName) -> RunConfig:
    return RunConfig(
        preset=name,
        model=ModelConfig(
            cell=cell,
            scope="token",
            num_blocks=1,
            num_layers=2,
            mlp_width=0,
            dropout=0.1,
            initialisation="normal",
        ),
        data=DataConfig(tokenizer="gpt2", sequence_length=512),
        solver=SolverConfig(metric="mse", tolerance=0.01, max_iterations=50),
        phase1=Phase1Config(objective="residual", literal_dialogues=10, max_steps=None),
        phase2=Phase2Config(
            optimiser="adamw",
            learning_rate=1e-3,
            batch_size=4,
            min_steps=0,
            evaluations=2,
        ),
        gate="seed",
    )


def _seed_sequential() -> RunConfig:
    return _seed_preset("seed-sequential", "sequential")


def _seed_layerwise() -> RunConfig:
    return _seed_preset("seed-layerwise", "layerwise")


def _layerwise() -> RunConfig:
    return RunConfig(
        preset="layerwise",
        model=ModelConfig(cell="layerwise", num_blocks=1, num_layers=2),
        data=DataConfig(sequence_length=512),
        phase1=Phase1Config(learning_rate=2e-3),
        phase2=Phase2Config(
            optimiser="adamw",
            batch_size=8,
            learning_rate=3e-3,
            pair_hinge=1.0,
            contractive=0.1,
            contractive_every=1,
        ),
    )


def _convex() -> RunConfig:
    # a recurrence narrower than the context costs less and loses nothing; its weights go to the MLP
    return RunConfig(model=ModelConfig(hidden_width=192, mlp_width=336))


def _demo() -> RunConfig:
    return RunConfig(
        preset="demo",
        model=ModelConfig(mlp_width=0),
        data=DataConfig(vocab_size=2048, max_dialogues=1700),
        phase1=Phase1Config(max_steps=100),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "seed-sequential": _seed_sequential,
    "seed-layerwise": _seed_layerwise,
    "layerwise": _layerwise,
    "convex": _convex,
    "demo": _demo,
}


def preset(name: str) -> RunConfig:
    """Return the complete config of a named preset.

    >>> preset("seed-layerwise").model.cell
    'layerwise'

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"a preset is one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]()
