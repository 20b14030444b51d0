"""One text, one token after another: all that does not depend on the context is done before.

The token's part of the first block is a table of the vocabulary, looked up; weights have their
limits applied once; each product writes where it is read. Axes as in `model`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell import ACTIVATIONS, BOUND, ContextCell, ConvexCell
from .model import GatedMLP, NewLLM

# projected tokens that are computed at once, while the table is made
_TABLE_ROWS = 8192
# a table is made for this share of its rows, read one after another
_TABLE_SHARE = 16

Update = Callable[[Tensor, Tensor], Tensor]


class Stepper:
    """Reads one token at a time of one text; equal to `NewLLM.forward` on `[1, 1]`.

    Args:
        model: in evaluation mode and sequence scope; its weights must not change from here on.
        tabled: look up what the first block reads of a token, in a table of the vocabulary.
        compiled: let `torch.compile` fuse a step; where there is no compiler, `compiled` is False
            after the first token. Slower than the plain step on the CPUs that we measured.

    >>> from new_llm.config import ModelConfig
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model = NewLLM(small, 50).eval()
    >>> step, context = Stepper(model), model.initial_context(1)
    >>> logits = step(3, context)
    >>> expected = model(torch.tensor([[3]]))
    >>> torch.allclose(logits, model.logits(expected.features)[0, 0], atol=1e-5)
    True
    >>> torch.allclose(context, expected.context, atol=1e-5)
    True
    """

    @torch.no_grad()
    def __init__(self, model: NewLLM, *, tabled: bool = True, compiled: bool = False) -> None:
        if model.config.scope != "sequence":
            raise ValueError("a model of sequence scope expected, got one of token scope")
        blocks = model.stages()
        self.model = model
        self.compiled = compiled
        self._fused, self._failures = self._pass, ()
        if compiled:
            # importing the compiler takes seconds
            from torch._dynamo.exc import TorchDynamoException

            self._fused, self._failures = torch.compile(self._pass), (TorchDynamoException,)
        self.tables = _tables(model) if tabled else None
        self.blocks = [
            _BlockStep(
                block.norm, block.cell, block.context_norm, block.out, block.mlp, first=not k
            )
            for k, block in enumerate(blocks)
        ]
        self.ids = torch.arange(model.vocab_size, device=model.embedding.weight.device)
        self.first_norm = layer_norm(blocks[0].norm)
        self.final_norm = layer_norm(model.final_norm)
        # columns, so that the product runs along memory
        self.readout = model.readout.weight.detach().T.contiguous().T

    @torch.inference_mode()
    def __call__(self, token: int, context: Tensor) -> Tensor:
        """Read a token: move the context `[1, K, C]` in place and return logits `[V]`."""
        if self.tables is None:
            h = self.model.embed(self.ids[token])
            projected = self.blocks[0].project(self.first_norm(h))
        else:
            h, projected = (table[token] for table in self.tables)
        if self.compiled:
            try:
                return self._fused(h, projected, context)
            except self._failures:
                self.compiled = False
        return self._pass(h, projected, context)

    def _pass(self, h: Tensor, projected: Tensor, context: Tensor) -> Tensor:
        for block, own in zip(self.blocks, context[0].unbind(), strict=True):
            h = block(h, projected, own)
        return torch.mv(self.readout, self.final_norm(h))


class Steppers:
    """Makes the `Stepper` of one model, and keeps it for the next text.

    A table of the vocabulary is made once so many tokens were asked for that it pays.

    >>> from new_llm.config import ModelConfig
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model, steppers = NewLLM(small, 160).eval(), Steppers()
    >>> steppers(model, 9).tables is None, steppers(model, 9).tables is None
    (True, False)
    """

    def __init__(self) -> None:
        self._kept: Stepper | None = None
        self._asked = 0

    def __call__(self, model: NewLLM, num_tokens: int) -> Stepper:
        """Return what steps a model, for a text of so many tokens."""
        self._asked += num_tokens
        tabled = self._asked >= model.vocab_size // _TABLE_SHARE
        if self._kept is None or (tabled and self._kept.tables is None):
            self._kept = Stepper(model, tabled=tabled)
        return self._kept


class _BlockStep:
    """One block for one token, `[E]` and `[C]`."""

    def __init__(
        self,
        norm: nn.LayerNorm,
        cell: ContextCell,
        context_norm: nn.LayerNorm,
        out: nn.Linear,
        mlp: GatedMLP | None,
        *,
        first: bool,
    ) -> None:
        self.norm = None if first else layer_norm(norm)
        self.project, self.update = _steps_of(cell)
        self.context_norm, self.out = layer_norm(context_norm), out.weight
        self.mlp = None
        if mlp is not None:
            self.mlp = (layer_norm(mlp.norm), mlp.wide.weight, mlp.narrow.weight)

    def __call__(self, h: Tensor, projected: Tensor, context: Tensor) -> Tensor:
        if self.norm is not None:
            projected = self.project(self.norm(h))
        self.update(context, projected)
        h = torch.addmv(h, self.out, self.context_norm(context))
        if self.mlp is None:
            return h
        norm, wide, narrow = self.mlp
        gate, value = torch.mv(wide, norm(h)).chunk(2)
        return h.addmv_(narrow, F.silu(gate).mul_(value))


def layer_norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Return a layer norm as a function: a module call costs as much as a small product."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


def _tables(model: NewLLM) -> tuple[Tensor, Tensor]:
    """Return every id's embedding `[V, E]`, and what the first cell reads of it, `[V, P]`."""
    block = model.stages()[0]
    parts = torch.arange(model.vocab_size, device=model.embedding.weight.device)
    embedded = [model.embed(ids) for ids in parts.split(_TABLE_ROWS)]
    return torch.cat(embedded), torch.cat([block.cell.project(block.norm(h)) for h in embedded])


def _steps_of(cell: ContextCell) -> tuple[Callable[[Tensor], Tensor], Callable[..., None]]:
    """Return `project` and an `update` in place, of vectors."""
    weights = cell.weights()
    if not isinstance(cell, ConvexCell):

        def move(context: Tensor, projected: Tensor) -> None:
            context.copy_(cell.update(context, projected, weights))

        return cell.project, move
    from_context, to_delta, bias = weights
    width, forget_max, phi = cell.hidden_width, cell.forget_max, ACTIVATIONS[cell.activation]
    widths = (width, width, cell.context_width)
    # all that the token decides in one product
    linears = (cell.from_token, cell.to_share, cell.to_forget)
    joined = torch.cat([linear.weight for linear in linears])
    joined_bias = torch.cat([linear.bias for linear in linears])

    def project(x: Tensor) -> Tensor:
        projected = torch.addmv(joined_bias, joined, x)
        projected[width : 2 * width].tanh_()
        projected[2 * width :].sigmoid_().mul_(forget_max)
        return projected

    def move_convex(context: Tensor, projected: Tensor) -> None:
        token_part, share, forget = projected.split_with_sizes(widths)
        hidden = torch.addcmul(token_part, share, torch.mv(from_context, context))
        delta = torch.addmv(bias, to_delta, phi(hidden))
        torch.lerp(delta.clamp_(-BOUND, BOUND), context, forget, out=context)

    return project, move_convex
