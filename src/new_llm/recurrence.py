"""Sequence scope: the context carried through a text, `c_t = f(c_{t-1}, x_t)`.

Three ways to the same contexts: `scan`, one position after another with exact gradients; `jacobi`,
every position at once, for any cell; gate-scan, which treats the gate of ConvexCell exactly.
At the start of a dialogue the previous context counts as zero; padding holds the context.
Axes: `B` sequences, `T` positions, `C` context width, `P` width of a projected token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cell import ACTIVATIONS, ContextCell, ConvexCell, Weights
from .errors import NonFiniteError

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What sweeps over a whole text reached; running out of sweeps is a result."""

    contexts: Tensor
    """`[B, T, C]`, detached."""
    residual: Tensor
    """Relative change of each position in the last sweep, `[B, T]`."""
    curve: Tensor
    """10 %, 50 %, 90 % quantile and maximum over positions after each sweep, `[K, 4]`."""
    converged: bool
    """Whether every position changed by less than the tolerance."""

    @property
    def num_sweeps(self) -> int:
        """Applications of the cell to every position."""
        return len(self.curve)


def scan(
    cell: ContextCell,
    x: Tensor,
    initial: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """Carry the context through a text, one position after another.

    Args:
        cell: the update.
        x: token embeddings, `[B, T, E]`.
        initial: context before the first position, `[B, C]`.
        starts: where a dialogue begins, `[B, T]` bool; the context before it counts as zero.
        real: False at padding, `[B, T]` bool; padding holds the context.
        weights: `cell.weights()`, where they were taken already.

    Returns:
        The context after each position, `[B, T, C]`. The last one is the carry of the next segment;
        detach it there and the gradient is that of truncated backpropagation through time.

    Source: exact backpropagation through time; for ConvexCell by a hand-written backward whose loop
    holds the recurrent products only, the weight gradients being one product after it.

    >>> cell = ConvexCell(4, 3, 5)
    >>> scan(cell, torch.ones(2, 7, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 7, 4])
    """
    projected = cell.project(x).to(initial.dtype)
    # contexts keep their precision where the large products of a text do not
    with torch.autocast(x.device.type, enabled=False):
        weights = cell.weights() if weights is None else weights
        # one position of generation is not worth what the hand-written scan prepares
        if isinstance(cell, ConvexCell) and (x.shape[1] > 1 or torch.is_grad_enabled()):
            return _convex_scan(cell, projected, weights, initial, starts, real)
        return scan_by_steps(cell, projected, weights, initial, starts=starts, real=real)


def scan_by_steps(
    cell: ContextCell,
    projected: Tensor,
    weights: Weights,
    initial: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Carry the context with one call of `cell.update` a position: the law that others must keep.

    Arguments are those of `scan`, with `project` and `weights` already taken.
    """
    context, contexts = initial, []
    for position, part in enumerate(projected.unbind(dim=1)):
        before = context
        if starts is not None:
            before = before.masked_fill(starts[:, position, None], 0.0)
        context = cell.update(before, part, weights)
        if real is not None:
            context = torch.where(real[:, position, None], context, before)
        contexts.append(context)
    return torch.stack(contexts, dim=1)


def _convex_scan(
    cell: ConvexCell,
    projected: Tensor,
    weights: Weights,
    initial: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """Run `_ConvexScan` time-major; padding is a gate that forgets nothing."""
    token_part, forget = projected.split([cell.hidden_width, cell.context_width], dim=-1)
    forget = forget.transpose(0, 1)
    if real is not None:
        forget = forget.masked_fill(~real.T[..., None], 1.0)
    keep = None if starts is None else (~starts.T[..., None]).to(projected.dtype)
    contexts: Any = _ConvexScan.apply(
        token_part.transpose(0, 1).contiguous(),
        forget.contiguous(),
        initial,
        *weights,
        keep,
        cell.activation,
    )
    return contexts.transpose(0, 1)


class _ConvexScan(torch.autograd.Function):
    """`c_t = forget_t c_{t-1} + (1 - forget_t) tanh(W_d phi(u_t + W_c c_{t-1}) + b_d)`.

    Time-major: token part `[T, B, H]`, forget `[T, B, C]`, keep `[T, B, 1]` (0 at a start) or None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        token_part, forget, initial, from_context, to_delta, bias, keep, activation = inputs
        num_positions, batch, width = forget.shape
        phi = ACTIVATIONS[activation]
        resets = _positions_with_start(keep, num_positions)
        from_context_t, to_delta_t = from_context.T.contiguous(), to_delta.T.contiguous()
        preactivation = torch.empty_like(token_part)
        delta = torch.empty_like(forget)
        # slot t holds the context before position t, slot t + 1 the one after it
        context = forget.new_empty(num_positions + 1, batch, width)
        context[0] = initial
        for t in range(num_positions):
            before = context[t]
            if resets[t]:
                before = before * keep[t]
            torch.addmm(token_part[t], before, from_context_t, out=preactivation[t])
            torch.addmm(bias, phi(preactivation[t]), to_delta_t, out=delta[t])
            delta[t].tanh_()
            torch.lerp(delta[t], before, forget[t], out=context[t + 1])
        ctx.save_for_backward(forget, context, preactivation, delta, from_context, to_delta, keep)
        ctx.activation, ctx.resets = activation, resets
        return context[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_context,) = grads
        forget, context, preactivation, delta, from_context, to_delta, keep = ctx.saved_tensors
        before = context[:-1] if keep is None else context[:-1] * keep
        with torch.enable_grad():
            leaf = preactivation.detach().requires_grad_()
            hidden = ACTIVATIONS[ctx.activation](leaf)
            (slope,) = torch.autograd.grad(hidden.sum(), leaf)
        hidden = hidden.detach()
        # d delta / d preactivation of tanh, times the share of delta in the new context
        reach = (1.0 - forget) * (1.0 - delta.square())
        total = torch.empty_like(forget)
        to_bias = torch.empty_like(forget)
        to_token = torch.empty_like(preactivation)
        carry = torch.zeros_like(context[0])
        for t in range(len(forget) - 1, -1, -1):
            torch.add(grad_context[t], carry, out=total[t])
            torch.mul(total[t], reach[t], out=to_bias[t])
            torch.mm(to_bias[t], to_delta, out=to_token[t])
            to_token[t].mul_(slope[t])
            torch.addmm(total[t] * forget[t], to_token[t], from_context, out=carry)
            if keep is not None and ctx.resets[t]:
                carry.mul_(keep[t])
        width, hidden_width = forget.shape[-1], preactivation.shape[-1]
        flat_bias, flat_token = to_bias.view(-1, width), to_token.view(-1, hidden_width)
        return (
            to_token,
            total * (before - delta),
            carry,
            flat_token.T @ before.reshape(-1, width),
            flat_bias.T @ hidden.reshape(-1, hidden_width),
            flat_bias.sum(dim=0),
            None,
            None,
        )


def _positions_with_start(keep: Tensor | None, num_positions: int) -> list[bool]:
    if keep is None:
        return [False] * num_positions
    return (keep == 0).flatten(1).any(dim=1).tolist()


@torch.no_grad()
def sweep(
    cell: ContextCell,
    x: Tensor,
    initial: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
    tolerance: float = 1e-5,
    max_sweeps: int = 128,
    gate_exact: bool | None = None,
    guess: Tensor | None = None,
) -> Swept:
    """Solve the whole text at once: apply the cell to every position until none moves.

    A Jacobi sweep is `c_t <- f(c_{t-1}, x_t)` from the last sweep's contexts; it is exact after T
    sweeps for any cell. Gate-scan keeps `delta` from the last sweep and treats the gate exactly by
    an associative scan, so that memory costs no sweeps and only coupling does.

    Args:
        cell: the update.
        x: token embeddings, `[B, T, E]`.
        initial: context before the first position, `[B, C]`.
        starts: where a dialogue begins, `[B, T]` bool.
        real: False at padding, `[B, T]` bool.
        tolerance: relative change below which a position rests.
        max_sweeps: cap on sweeps.
        gate_exact: gate-scan instead of Jacobi; None is gate-scan wherever the cell allows it.
        guess: contexts to start from, `[B, T, C]`; None starts from zero.

    Raises:
        ValueError: `gate_exact` for a cell whose gate is not separate.
        NonFiniteError: contexts became NaN or infinite.

    Source: parallel solves of nonlinear recurrences, DEER (arXiv:2309.12252) and quasi-DEER
    (arXiv:2407.19115); gate-scan differs in that the linear part is the cell's own gate.

    >>> cell = ConvexCell(4, 3, 5).eval()
    >>> x, zero = torch.ones(1, 9, 3), torch.zeros(1, 4)
    >>> torch.allclose(sweep(cell, x, zero).contexts, scan(cell, x, zero), atol=1e-4)
    True
    """
    if gate_exact is None:
        gate_exact = cell.separates_gate
    if gate_exact and not cell.separates_gate:
        raise ValueError(f"gate-scan needs a separate gate, which {type(cell).__name__} has not")
    projected, weights = cell.project(x), cell.weights()
    batch, length, _ = x.shape
    contexts = initial.new_zeros(batch, length, cell.context_width) if guess is None else guess
    keep = None if starts is None else (~starts[..., None]).to(x.dtype)
    forget = projected[..., -cell.context_width :]
    if real is not None:
        forget = forget.masked_fill(~real[..., None], 1.0)
    curve: list[Tensor] = []
    residual = x.new_zeros(batch, length)
    for number in range(1, max_sweeps + 1):
        before = torch.cat([initial[:, None], contexts[:, :-1]], dim=1)
        if keep is not None:
            before = before * keep
        if gate_exact:
            delta = cell.search_map(before, projected, weights)
            decay = forget if keep is None else forget * keep
            updated = linear_scan(decay, (1.0 - forget) * delta, initial)
        else:
            updated = cell.update(before, projected, weights)
            if real is not None:
                updated = torch.where(real[..., None], updated, before)
        distance = (updated - contexts).norm(dim=-1)
        residual = distance / updated.norm(dim=-1).clamp(min=_TINY)
        if not torch.isfinite(residual).all():
            raise NonFiniteError(
                f"contexts must stay finite, got NaN or infinity in sweep {number} of "
                f"{max_sweeps}; lower the learning rate or check the weights"
            )
        contexts = updated
        ordered = residual.flatten().sort().values
        last = len(ordered) - 1
        curve.append(torch.stack([ordered[round(share * last)] for share in (0.1, 0.5, 0.9, 1.0)]))
        if curve[-1][-1] < tolerance:
            break
    return Swept(
        contexts=contexts,
        residual=residual,
        curve=torch.stack(curve).cpu(),
        converged=bool(curve[-1][-1] < tolerance),
    )


def linear_scan(decay: Tensor, source: Tensor, initial: Tensor) -> Tensor:
    """Return `c_t = decay_t * c_{t-1} + source_t` for all `t` in about `log2(T)` products.

    All `[B, T, C]`, `initial` `[B, C]`.

    Source: Hillis and Steele 1986, "Data parallel algorithms"; no logarithm or division, so gates
    of exactly 0 and 1 are exact.

    >>> half = torch.full((1, 3, 1), 0.5)
    >>> linear_scan(half, torch.ones(1, 3, 1), torch.zeros(1, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    source = torch.cat([source[:, :1] + decay[:, :1] * initial[:, None], source[:, 1:]], dim=1)
    length, stride = source.shape[1], 1
    while stride < length:
        reached = source[:, stride:] + decay[:, stride:] * source[:, :-stride]
        source = torch.cat([source[:, :stride], reached], dim=1)
        if 2 * stride < length:
            chained = decay[:, stride:] * decay[:, :-stride]
            decay = torch.cat([decay[:, :stride], chained], dim=1)
        stride *= 2
    return source
