"""The language model: embed, cells, read-out. The only place where they meet.

Axes: `B` sequences, `T` positions, `K` blocks, `C` context width, `E` embedding width,
`V` vocabulary. A context of the model is `[B, K, C]` and is copied and forked as a whole.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Generic, Literal, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cell import ContextCell, ConvexCell, LayerwiseCell, SequentialCell, Stacks, Weights
from .config import CELL_GROUP, ModelConfig, SolverConfig
from .errors import ConfigError
from .fixed_point import FixedPoint, solve
from .recurrence import Carried, Choice, Engine, carry, choose
from .scan import scan


def build_cell(config: ModelConfig) -> ContextCell:
    """Return a new cell of the configured kind.

    Raises:
        ConfigError: a cell of another package cannot be had from it.

    >>> type(build_cell(ModelConfig(cell="convex"))).__name__
    'ConvexCell'
    """
    widths = (config.context_width, config.embedding_width, config.hidden_width)
    if config.cell == "convex":
        return ConvexCell(
            *widths,
            coupling_limit=config.coupling_limit,
            activation=config.activation,
            forget_max=config.forget_max,
            longest_timescale=config.longest_timescale,
            certified=config.certified,
        )
    if config.cell not in ("sequential", "layerwise"):
        return _registered_cell(config)
    seed_cell = SequentialCell if config.cell == "sequential" else LayerwiseCell
    return seed_cell(
        *widths,
        num_layers=config.num_layers,
        dropout=config.dropout,
        clip=config.clip,
        initialisation=config.initialisation,
    )


def _registered_cell(config: ModelConfig) -> ContextCell:
    """Return a new cell of the package that registers its name.

    Raises:
        ConfigError: several packages register it, its code cannot be imported, or what is built
            has other widths.
    """
    found = list(entry_points(group=CELL_GROUP, name=config.cell))
    if len(found) != 1:
        named = ", ".join(sorted(entry.value for entry in found)) or "none"
        raise ConfigError(
            f"one installed package expected that registers the cell {config.cell!r} in "
            f"{CELL_GROUP}, got {named}; install one of them only"
        )
    try:
        make = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the cell {config.cell!r} expected at {found[0].value}, it cannot be imported "
            f"({error}); mend or remove the package that registers it"
        ) from None
    cell = make(config)
    wanted = (config.context_width, config.embedding_width)
    # no check of its class: beside the weights of a checkpoint lies a `ContextCell` of its own
    given = tuple(getattr(cell, name, None) for name in ("context_width", "embedding_width"))
    if given != wanted:
        raise ConfigError(
            f"a cell of context_width and embedding_width {wanted} expected, {found[0].value} "
            f"returned one of {given}; a cell is a ContextCell, made from the ModelConfig it gets"
        )
    return cell


Inner = TypeVar("Inner", bound=nn.Module)


class GatedMLP(Stacks):
    """`W_o (silu(W_g h) * W_v h)` of the normalised stream; adds nothing until it is trained.

    Source: SwiGLU (arXiv:2002.05202).

    >>> GatedMLP(4, 6)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * mlp_width, bias=False)
        self.stacked = {"wide.weight": 2}
        self.narrow = nn.Linear(mlp_width, width, bias=False)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, h: Tensor) -> Tensor:
        """Return what is added to the stream, `[..., E]` to `[..., E]`."""
        gate, value = self.wide(self.norm(h)).chunk(2, dim=-1)
        return self.narrow(F.silu(gate) * value)


class Block(nn.Module, Generic[Inner]):
    """One cell and its read-out: `h + W_o norm(context)`, then a residual gated MLP.

    Args:
        cell: what carries a context; of peers, whatever stands in its place.
        width: of the stream, E.
        context_width: of what the cell hands to the read-out.
        mlp_width: inside the MLP; 0 leaves it out.
    """

    def __init__(self, cell: Inner, width: int, context_width: int, mlp_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cell = cell
        self.context_norm = nn.LayerNorm(context_width)
        self.out = nn.Linear(context_width, width, bias=False)
        nn.init.normal_(self.out.weight, std=context_width**-0.5)
        self.mlp = GatedMLP(width, mlp_width) if mlp_width else None

    def read_out(self) -> list[nn.Module]:
        """Return the modules that read contexts and that no cell of this block reads."""
        modules: list[nn.Module] = [self.context_norm, self.out]
        return modules if self.mlp is None else [*modules, self.mlp]

    def read(self, h: Tensor, contexts: Tensor) -> Tensor:
        """Add what the contexts say to the stream: `[..., E]` and `[..., C]` to `[..., E]`."""
        h = h + self.out(self.context_norm(contexts))
        return h if self.mlp is None else h + self.mlp(h)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSearch:
    """Fixed points of single tokens, block after block."""

    contexts: Tensor
    """Contexts as delivered, `[N, K, C]`."""
    blocks: tuple[FixedPoint, ...]
    """The record of each block's search."""
    inputs: tuple[Tensor, ...]
    """What each block's cell read, `[N, E]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """What the model says after each position."""

    features: Tensor
    """Normalised stream before the vocabulary, `[B, T, E]`."""
    context: Tensor
    """Context after the last position, `[B, K, C]`."""
    carried: tuple[Carried, ...] = ()
    """How each block's contexts were found, where they were not known already."""


class LanguageModel(nn.Module, ABC):
    """Contract of all that Phase 2 trains and `evaluate` scores: ours, and its peers."""

    vocab_size: int
    embedding: nn.Embedding
    readout: nn.Linear

    @abstractmethod
    def initial_context(self, batch: int) -> Tensor:
        """Return what is carried before any text; the first axis is `B`."""

    @abstractmethod
    def forward(
        self,
        ids: Tensor,
        context: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> ModelOutput:
        """Read token ids `[B, T]`: features before the vocabulary, and what is carried on.

        Args:
            ids: token ids, `[B, T]`.
            context: what is carried from before; None is nothing.
            starts: where a dialogue begins, `[B, T]` bool; nothing before it may be known after.
            real: False at padding, `[B, T]` bool.
        """


# positions of one text that measure how many sweeps gate-scan takes
_MEASURED_LENGTH = 128


@final
class NewLLM(LanguageModel):
    """A language model whose memory of a text is one context.

    Args:
        config: shape of the model.
        vocab_size: tokens of the vocabulary, role tokens included.
        solver: stop rule of the search, which a token-scope model reads every token with.

    >>> model = NewLLM(ModelConfig(context_width=8, embedding_width=8, hidden_width=8), 50)
    >>> ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    >>> output = model(ids)
    >>> model.logits(output.features).shape, output.context.shape
    (torch.Size([2, 3, 50]), torch.Size([2, 2, 8]))
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, solver: SolverConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.solver = solver or SolverConfig()
        # blocks are computed anew in the backward pass, which then keeps only what they read
        self.gradient_checkpointing = False
        width = config.embedding_width
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.embedding_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(build_cell(config), width, config.context_width, config.mlp_width)
            for _ in range(config.num_blocks)
        )
        self.final_norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocab_size, bias=False)
        if config.tied_readout:
            self.readout.weight = self.embedding.weight
        else:
            nn.init.normal_(self.readout.weight, std=0.02)

    def cells(self) -> list[ContextCell]:
        """Return the cell of each block."""
        return [block.cell for block in self.stages()]

    def weights(self) -> list[Weights]:
        """Return the weights of each block's cell, limits applied: once for a loop of calls."""
        return [cell.weights() for cell in self.cells()]

    def read_outs(self) -> list[list[nn.Module]]:
        """Return the read-out modules of each block."""
        return [block.read_out() for block in self.stages()]

    def stages(self) -> list[Block[ContextCell]]:
        """Return the blocks, in the order in which a text passes them."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def initial_context(self, batch: int) -> Tensor:
        """Return the context before any text: zeros, `[B, K, C]`."""
        shape = (batch, self.config.num_blocks, self.config.context_width)
        return self.embedding.weight.new_zeros(shape)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the layer-normalised embeddings of token ids, `[...]` to `[..., E]`."""
        return self.embedding_norm(self.embedding(ids))

    def logits(self, features: Tensor) -> Tensor:
        """Project features to the vocabulary, `[..., E]` to `[..., V]`."""
        return self.readout(features)

    def forward(
        self,
        ids: Tensor | None,
        context: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        real: Tensor | None = None,
        contexts: Tensor | None = None,
        weights: Sequence[Weights] | None = None,
        engines: Sequence[Engine] | None = None,
        embedded: Tensor | None = None,
    ) -> ModelOutput:
        """Read token ids and return features and the context that follows.

        Args:
            ids: token ids, `[B, T]`; None where `embedded` is given.
            context: context before the first position, `[B, K, C]`; None is zeros.
            starts: where a dialogue begins, `[B, T]` bool; the context before it counts as zero.
            real: False at padding, on either side, `[B, T]` bool; padding holds the context.
            contexts: contexts after each position, already known, `[B, T, K, C]`.
            weights: `weights()`, where a loop of calls took them once.
            engines: how each block carries its context; None is scan.
            embedded: rows of the embedding in place of ids, `[B, T, E]`; sequence scope only.

        Raises:
            ValueError: nothing to read, or token scope without ids.
        """
        if contexts is None and self.config.scope == "token":
            if ids is None:
                raise ValueError("token scope searches a fixed point a token id, got no ids")
            contexts = self.rest(ids, self.search_distinct(ids))
        if ids is None and embedded is None:
            raise ValueError("ids or rows of the embedding expected, got neither")
        h = self.embedding_norm(self.embedding(ids) if embedded is None else embedded)
        if context is None:
            context = self.initial_context(len(h))
        checkpointed = self.gradient_checkpointing and self.training
        if checkpointed and weights is None:
            # taking weights in training moves what the limit follows: once, not again backward
            weights = self.weights()
        last, carried = [], []
        for k, block in enumerate(self.stages()):
            known = None if contexts is None else contexts[:, :, k]
            passed = partial(
                _passed,
                block,
                known=known,
                starts=starts,
                real=real,
                weights=None if weights is None else weights[k],
                engine="scan" if engines is None else engines[k],
            )
            if checkpointed:
                h, after, found = checkpoint(passed, h, context[:, k], use_reentrant=False)
            else:
                h, after, found = passed(h, context[:, k])
            last.append(after)
            if found is not None:
                carried.append(found)
        return ModelOutput(
            features=self.final_norm(h),
            context=torch.stack(last, dim=1),
            carried=tuple(carried),
        )

    @torch.no_grad()
    def choose_engines(
        self, ids: Tensor, *, engine: Engine | Literal["auto"] = "auto"
    ) -> list[Choice]:
        """Choose how each block carries its context through texts like `ids`, `[B, T]`.

        `auto` solves the first positions of the first text by gate-scan and counts the sweeps.
        """
        blocks = self.stages()
        if engine != "auto":
            return [Choice(engine=engine, why="asked for") for _ in blocks]
        h = self.embed(ids[:1, :_MEASURED_LENGTH])
        context = self.initial_context(1)
        choices = []
        for k, block in enumerate(blocks):
            x, num_sweeps = block.norm(h), None
            if block.cell.separates_gate:
                found = carry(block.cell, x, context[:, k], engine="gate-scan")
                num_sweeps = found.sweeps.num_sweeps
                h = block.read(h, found.contexts)
            choices.append(
                choose(
                    block.cell,
                    device=ids.device.type,
                    batch=ids.shape[0],
                    length=ids.shape[1],
                    num_sweeps=num_sweeps,
                )
            )
        return choices

    @torch.no_grad()
    def audit(
        self,
        ids: Tensor,
        context: Tensor,
        found: Sequence[Carried],
        *,
        starts: Tensor | None = None,
        real: Tensor | None = None,
        window: int = 128,
        seed: int = 0,
    ) -> float:
        """Return how far contexts of all blocks are from an exact scan of a random window.

        Bounds of an engine hold for a block given what it reads; here each block reads what the
        exact blocks before it say. The largest relative difference of any block and position.

        Args:
            ids: token ids, `[B, T]`.
            context: context before the first position, `[B, K, C]`.
            found: `carried` of a forward pass over `ids`.
            starts: as in that pass.
            real: as in that pass.
            window: positions that are scanned.
            seed: of the window's place.
        """
        generator = torch.Generator().manual_seed(seed)
        last = max(ids.shape[1] - window, 0)
        begin = int(torch.randint(last + 1, (), generator=generator))
        part = slice(begin, begin + window)
        contexts = [one.contexts for one in found]
        if begin > 0:
            context = torch.stack([one[:, begin - 1] for one in contexts], dim=1)
        _, exact = self.stream_contexts(
            ids[:, part],
            context,
            starts=None if starts is None else starts[:, part],
            real=None if real is None else real[:, part],
        )
        return max(
            ((one[:, part] - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-6)).max().item()
            for one, truth in zip(contexts, exact, strict=True)
        )

    def stream_contexts(
        self,
        ids: Tensor,
        context: Tensor,
        *,
        starts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what each block's cell reads, `[B, T, E]`, and its contexts, `[B, T, C]`."""
        h = self.embed(ids)
        inputs, contexts = [], []
        for k, block in enumerate(self.stages()):
            inputs.append(block.norm(h))
            contexts.append(scan(block.cell, inputs[-1], context[:, k], starts=starts, real=real))
            h = block.read(h, contexts[-1])
        return inputs, contexts

    @torch.no_grad()
    def search(self, ids: Tensor, solver: SolverConfig | None = None) -> TokenSearch:
        """Find the fixed points of distinct token ids from zero, `[N]`, with frozen weights.

        The blocks are solved one after another: each reads what the one before settled at.
        """
        solver = solver or self.solver
        h = self.embed(ids)
        found, inputs = [], []
        for block in self.stages():
            x = block.norm(h)
            initial = h.new_zeros(len(ids), self.config.context_width)
            point = solve_tokens(block.cell, x, initial, solver)
            found.append(point)
            inputs.append(x)
            h = block.read(h, point.context)
        contexts = torch.stack([point.context for point in found], dim=1)
        return TokenSearch(contexts=contexts, blocks=tuple(found), inputs=tuple(inputs))

    @torch.no_grad()
    def search_inputs(self, ids: Tensor, block: int) -> Tensor:
        """Return what a block's cell reads where single tokens rest, `[N]` to `[N, E]`."""
        h = self.embed(ids)
        for before in self.stages()[:block]:
            initial = h.new_zeros(len(ids), self.config.context_width)
            h = before.read(
                h, solve_tokens(before.cell, before.norm(h), initial, self.solver).context
            )
        return self.stages()[block].norm(h)

    def search_distinct(self, ids: Tensor) -> Tensor:
        """Return the delivered contexts of ids, each distinct one solved once, `[..., K, C]`."""
        distinct, place = ids.unique(return_inverse=True)
        return self.search(distinct).contexts[place]

    def rest(self, ids: Tensor, delivered: Tensor) -> Tensor:
        """Return `f(c*.detach(), x)` of delivered contexts, `[B, T, K, C]`: one-step gradient.

        Source: the one-step (Jacobian-free) gradient, Fung et al. 2022 (arXiv:2103.12803).
        """
        block = self.stages()[0]
        x = block.norm(self.embed(ids))
        return block.cell(delivered.detach()[:, :, 0], x)[:, :, None]


def solve_tokens(cell: ContextCell, x: Tensor, initial: Tensor, solver: SolverConfig) -> FixedPoint:
    """Search the fixed points of a cell for token inputs `[N, E]` from contexts `[N, C]`.

    Where a `distance` is asked for, tokens that are still further away by their own rate go on in
    double precision: near the end of a slow contraction single precision moves in circles.
    """
    found = _search(cell, x, initial, solver)
    if solver.distance is None:
        return found
    # an estimate: measured ones were short of the truth by a tenth, never by half
    far = (found.distance > 0.5 * solver.distance).nonzero()[:, 0]
    if len(far) == 0:
        return found
    # a change this small is near enough at any rate up to 0.999
    finer = replace(solver, tolerance=1e-3 * solver.distance, warmup=0)
    wide = copy.deepcopy(cell).double()
    return found.replaced(far, _search(wide, x[far].double(), found.context[far].double(), finer))


def _search(cell: ContextCell, x: Tensor, initial: Tensor, solver: SolverConfig) -> FixedPoint:
    projected, weights = cell.project(x), cell.weights()
    return solve(
        lambda context, rows: cell.search_map(context, projected[rows], weights),
        initial,
        metric=solver.metric,
        tolerance=solver.tolerance,
        max_iterations=solver.max_iterations,
        warmup=solver.warmup,
        damping=solver.damping,
        method=solver.method,
    )


def _passed(
    block: Block[ContextCell],
    h: Tensor,
    before: Tensor,
    *,
    known: Tensor | None,
    starts: Tensor | None,
    real: Tensor | None,
    weights: Weights | None,
    engine: Engine,
) -> tuple[Tensor, Tensor, Carried | None]:
    """Return the stream after a block, its last context, and how its contexts were found."""
    if known is not None:
        after = known if real is None else _hold(known, before, real)
        return block.read(h, after), after[:, -1], None
    found = carry(
        block.cell, block.norm(h), before, engine=engine, starts=starts, real=real, weights=weights
    )
    return block.read(h, found.contexts), found.contexts[:, -1], found


def _hold(contexts: Tensor, initial: Tensor, real: Tensor) -> Tensor:
    """Replace contexts at padding by the last real one before it, or by `initial`."""
    positions = torch.arange(real.shape[1], device=real.device)
    last_real = torch.where(real, positions, -1).cummax(dim=1).values
    held = contexts.gather(1, last_real.clamp(min=0)[..., None].expand_as(contexts))
    return torch.where((last_real >= 0)[..., None], held, initial[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """Cross-entropy of chosen positions."""

    loss: Tensor
    """Weighted sum, differentiable."""
    nats: Tensor
    """Negative log-likelihood of each position, `[N]`, detached."""
    correct: Tensor
    """Whether the most likely token is the target, `[N]`."""


def token_losses(
    features: Tensor, readout: Tensor, targets: Tensor, weights: Tensor, *, chunk: int
) -> TokenLosses:
    """Return the cross-entropy of `features @ readout.T` without ever holding all logits.

    Args:
        features: `[N, E]`, only positions that count; their type is that of the products.
        readout: vocabulary matrix, `[V, E]`.
        targets: token ids, `[N]`.
        weights: share of each position in the loss, `[N]`.
        chunk: positions projected at once.

    Source: gradients taken chunk by chunk in the forward pass, as in Liger Kernel
    (arXiv:2410.10989).

    >>> losses = token_losses(torch.zeros(3, 2), torch.zeros(5, 2), torch.tensor([0, 1, 2]),
    ...                       torch.full((3,), 1 / 3), chunk=2)
    >>> round(losses.loss.item(), 4)
    1.6094
    """
    loss, nats, correct = _ChunkedCrossEntropy.apply(features, readout, targets, weights, chunk)  # pyright: ignore[reportGeneralTypeIssues]
    return TokenLosses(loss=loss, nats=nats, correct=correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        features, readout, targets, weights, chunk = inputs
        wants_features, wants_readout = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if wants_features else None
        grad_readout = torch.zeros_like(readout) if wants_readout else None
        table = readout.to(features.dtype)
        nats = features.new_empty(len(features), dtype=torch.float32)
        correct = torch.empty(len(features), dtype=torch.bool, device=features.device)
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            logits = (features[part] @ table.T).float()
            target = targets[part, None]
            highest, likely = logits.max(dim=-1, keepdim=True)
            correct[part] = likely[:, 0] == target[:, 0]
            wanted = logits.gather(1, target) - highest
            # in place: a pass over all logits costs as much as a tenth of their product
            share = logits.sub_(highest).exp_()
            total = share.sum(dim=-1, keepdim=True)
            nats[part] = (total.log() - wanted)[:, 0]
            if wants_features or wants_readout:
                scale = weights[part, None]
                slope = share.mul_(scale / total)
                slope.scatter_add_(1, target, -scale)
                slope = slope.to(features.dtype)
                if grad_features is not None:
                    torch.mm(slope, table, out=grad_features[part])
                if grad_readout is None:
                    continue
                if table.dtype == readout.dtype:
                    grad_readout.addmm_(slope.T, features[part])
                else:  # parts are summed in the type of the weights
                    grad_readout += slope.T @ features[part]
        ctx.save_for_backward(grad_features, grad_readout)
        ctx.mark_non_differentiable(nats, correct)
        return (nats * weights).sum(), nats, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_features, grad_readout = ctx.saved_tensors
        if grad_features is not None:
            grad_features = grad_features * grads[0]
        if grad_readout is not None:
            grad_readout = grad_readout * grads[0]
        return grad_features, grad_readout, None, None, None


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable and fixed parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
