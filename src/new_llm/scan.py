"""Sequence scope, one position after another: `c_t = f(c_{t-1}, x_t)` with exact gradients.

The law that every other engine is compared with. At the start of a dialogue the previous context
counts as zero; padding holds the context. Axes: `B` sequences, `T` positions, `C` context width,
`P` width of a projected token, `H` hidden width, `S` stages of a seed cell.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cell import ACTIVATIONS, ContextCell, ConvexCell, SeedCell, Stage, Weights


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
        x: token embeddings, `[B, T, E]`; bfloat16 is allowed, contexts keep the type of `initial`.
        initial: context before the first position, `[B, C]`.
        starts: where a dialogue begins, `[B, T]` bool; the context before it counts as zero.
        real: False at padding, `[B, T]` bool; padding holds the context.
        weights: `cell.weights()`, where they were taken already.

    Returns:
        The context after each position, `[B, T, C]`. The last one is the carry of the next segment;
        detach it there and the gradient is that of truncated backpropagation through time.

    Source: exact backpropagation through time by a hand-written backward whose loop holds the
    recurrent products only; the weight gradients are one product after it.

    >>> cell = ConvexCell(4, 3, 5)
    >>> scan(cell, torch.ones(2, 7, 3), torch.zeros(2, 4)).shape
    torch.Size([2, 7, 4])
    """
    projected = cell.project(x).to(initial.dtype)
    # contexts keep their precision where the large products of a text do not
    with torch.autocast(x.device.type, enabled=False):
        weights = cell.weights() if weights is None else weights
        return scan_projected(cell, projected, weights, initial, starts=starts, real=real)


def scan_projected(
    cell: ContextCell,
    projected: Tensor,
    weights: Weights,
    initial: Tensor,
    *,
    starts: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Carry the context through tokens `[B, T, P]` whose `project` was taken already."""
    # one position of generation is not worth what the hand-written scans prepare
    if projected.shape[1] > 1 or torch.is_grad_enabled():
        if isinstance(cell, ConvexCell):
            return _scan_convex(cell, projected, weights, initial, starts, real)
        if isinstance(cell, SeedCell):
            return _scan_gated(cell, projected, weights, initial, starts, real)
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
    """Carry the context with one call of `cell.update` a position: what the others must equal."""
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


def _scan_convex(
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
        # what only a backward pass reads is not kept where none comes
        kept = any(ctx.needs_input_grad)
        preactivation = torch.empty_like(token_part if kept else token_part[:1])
        delta = torch.empty_like(forget if kept else forget[:1])
        # slot t holds the context before position t, slot t + 1 the one after it
        context = forget.new_empty(num_positions + 1, batch, width)
        context[0] = initial
        # views are taken at once: each costs as much as a small product
        parts, forgets, contexts = token_part.unbind(), forget.unbind(), context.unbind()
        preactivations, deltas = _rows(preactivation, num_positions), _rows(delta, num_positions)
        for t in range(num_positions):
            before = contexts[t]
            if resets[t]:
                before = before * keep[t]
            torch.addmm(parts[t], before, from_context_t, out=preactivations[t])
            torch.addmm(bias, phi(preactivations[t]), to_delta_t, out=deltas[t])
            deltas[t].tanh_()
            torch.lerp(deltas[t], before, forgets[t], out=contexts[t + 1])
        if kept:
            ctx.save_for_backward(
                forget, context, preactivation, delta, from_context, to_delta, keep
            )
            ctx.activation, ctx.resets = activation, resets
        return context[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_context,) = grads
        forget, context, preactivation, delta, from_context, to_delta, keep = ctx.saved_tensors
        before = context[:-1] if keep is None else context[:-1] * keep
        hidden, slope = activated(preactivation, ctx.activation)
        # d delta / d preactivation of tanh, times the share of delta in the new context
        reach = (1.0 - forget) * (1.0 - delta.square())
        total = torch.empty_like(forget)
        to_bias = torch.empty_like(forget)
        to_token = torch.empty_like(preactivation)
        carry = torch.zeros_like(context[0])
        rows = zip(
            *(part.unbind() for part in (grad_context, total, reach, to_bias, to_token, slope,
                                         forget)),
            range(len(forget)),
            strict=True,
        )  # fmt: skip
        for grad_t, total_t, reach_t, bias_t, token_t, slope_t, forget_t, t in reversed([*rows]):
            torch.add(grad_t, carry, out=total_t)
            torch.mul(total_t, reach_t, out=bias_t)
            torch.mm(bias_t, to_delta, out=token_t)
            token_t.mul_(slope_t)
            torch.addmm(total_t * forget_t, token_t, from_context, out=carry)
            if keep is not None and ctx.resets[t]:
                carry.mul_(keep[t])
        to_forget, *to_weights = convex_gradients(
            total, to_bias, to_token, before=before, hidden=hidden, delta=delta
        )
        return to_token, to_forget, carry, *to_weights, None, None


def convex_gradients(
    total: Tensor,
    to_bias: Tensor,
    to_token: Tensor,
    *,
    before: Tensor,
    hidden: Tensor,
    delta: Tensor,
) -> tuple[Tensor, ...]:
    """Return gradients of ConvexCell's gate and weights, one product each for all positions.

    Args:
        total: gradient of the context after each position, `[T, B, C]`.
        to_bias: of the preactivation of tanh, `[T, B, C]`.
        to_token: of the preactivation of `phi`, `[T, B, H]`.
        before: context that each position read, `[T, B, C]`.
        hidden: `phi` at each position, `[T, B, H]`.
        delta: what each position would have settled at, `[T, B, C]`.
    """
    flat_bias, flat_token = to_bias.flatten(0, 1), to_token.flatten(0, 1)
    return (
        total * (before - delta),
        flat_token.T @ before.flatten(0, 1),
        flat_bias.T @ hidden.flatten(0, 1),
        flat_bias.sum(dim=0),
    )


def activated(preactivation: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return `phi` and its slope, detached, any shape.

    >>> activated(torch.zeros(1), "silu")
    (tensor([0.]), tensor([0.5000]))
    """
    with torch.enable_grad():
        leaf = preactivation.detach().requires_grad_()
        hidden = ACTIVATIONS[activation](leaf)
        (slope,) = torch.autograd.grad(hidden.sum(), leaf)
    return hidden.detach(), slope


def _positions_with_start(keep: Tensor | None, num_positions: int) -> list[bool]:
    if keep is None:
        return [False] * num_positions
    return (keep == 0).flatten(1).any(dim=1).tolist()


def _rows(buffer: Tensor, count: int) -> list[Tensor]:
    """Return the rows of a buffer, one for all where it has only one."""
    rows = [*buffer.unbind()]
    return rows if len(rows) == count else rows * count


def _scan_gated(
    cell: SeedCell,
    projected: Tensor,
    weights: Weights,
    initial: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
) -> Tensor:
    """Run `_GatedScan` time-major, with the dropout of each hidden layer drawn before the loop."""
    stages = cell.stages(weights)
    batch, length, _ = projected.shape
    token_part = projected.unflatten(-1, (len(stages), -1)).permute(1, 2, 0, 3).contiguous()
    keep = None if starts is None else (~starts.T[..., None]).to(projected.dtype)
    held = None if real is None else (~real.T[..., None]).to(projected.dtype)
    num_hidden = len(stages[0].hidden) + 1
    masks = None
    if cell.training and cell.dropout > 0.0:
        shape = (length, len(stages), num_hidden, batch, token_part.shape[-1])
        masks = F.dropout(projected.new_ones(shape), cell.dropout)
    contexts: Any = _GatedScan.apply(
        token_part,
        initial,
        keep,
        held,
        masks,
        cell.clip,
        num_hidden,
        *(tensor for stage in stages for tensor in _flat(stage)),
    )
    return contexts.transpose(0, 1)


def _flat(stage: Stage) -> list[Tensor]:
    return [stage.from_context, *(part for pair in stage.hidden for part in pair),
            *stage.gate, *stage.norm]  # fmt: skip


def _stages(flat: tuple[Tensor, ...], num_hidden: int) -> list[Stage]:
    """Sort tensors that `_flat` laid in a row back into stages."""
    size = 2 * num_hidden + 3
    found = []
    for i in range(0, len(flat), size):
        pairs = [flat[j : j + 2] for j in range(i + 1, i + size, 2)]
        found.append(Stage(flat[i], pairs[:-2], pairs[-2], pairs[-1]))
    return found


_EPSILON = 1e-5  # of F.layer_norm


class _GatedScan(torch.autograd.Function):
    """The seed cells: each stage is hidden layers, three gates and a layer norm.

    Time-major: token part `[T, S, B, H]`; keep `[T, B, 1]` (0 at a start), held `[T, B, 1]` (1 at
    padding), dropout masks `[T, S, L, B, H]`, each or None; the tensors of all stages in a row.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        token_part, initial, keep, held, masks, clip, num_hidden, *flat = inputs
        stages = _stages(tuple(flat), num_hidden)
        num_positions, num_stages, batch, hidden_width = token_part.shape
        width = initial.shape[-1]
        resets, holds = _positions_with_start(keep, num_positions), _any_held(held, num_positions)
        # what only a backward pass reads is not kept where none comes
        kept = any(ctx.needs_input_grad)
        slots = num_positions if kept else 1
        hidden = initial.new_empty(slots, num_stages, num_hidden, batch, hidden_width)
        gates = initial.new_empty(slots, num_stages, batch, 3, width)
        mixed = initial.new_empty(slots, num_stages, batch, width)
        # what each stage reads; what the last one writes stands in `context`
        before = initial.new_empty(slots, num_stages, batch, width)
        context = initial.new_empty(num_positions, batch, width)
        transposed = [
            [stage.from_context.T.contiguous(), *(w.T.contiguous() for w, _ in stage.hidden)]
            for stage in stages
        ]
        to_gates = [stage.gate[0].T.contiguous() for stage in stages]
        # views are taken at once: each costs as much as a small product
        parts, contexts = _grid(token_part, 2), context.unbind()
        hiddens = _grid(hidden, 3)
        flat_gates = _grid(gates.flatten(-2), 2)
        deltas = _grid(gates[..., 0, :], 2)
        shares = _grid(gates[..., 1:, :], 2)
        forgets, inserts = _grid(gates[..., 1, :], 2), _grid(gates[..., 2, :], 2)
        mixes, befores = _grid(mixed, 2), _grid(before, 2)
        dropped = None if masks is None else _grid(masks, 3)
        carried = initial
        for t in range(num_positions):
            slot = t if kept else 0
            if resets[t]:
                carried = carried * keep[t]
            c = carried
            for s, stage in enumerate(stages):
                h = hiddens[slot][s]
                torch.addmm(parts[t][s], c, transposed[s][0], out=h[0]).relu_()
                if dropped is not None:
                    h[0].mul_(dropped[t][s][0])
                for i, (_, bias) in enumerate(stage.hidden, start=1):
                    torch.addmm(bias, h[i - 1], transposed[s][i], out=h[i]).relu_()
                    if dropped is not None:
                        h[i].mul_(dropped[t][s][i])
                torch.addmm(stage.gate[1], h[-1], to_gates[s], out=flat_gates[slot][s])
                deltas[slot][s].tanh_()
                shares[slot][s].sigmoid_()
                mix = mixes[slot][s]
                torch.mul(forgets[slot][s], c, out=mix)
                mix.addcmul_(inserts[slot][s], deltas[slot][s])
                if kept:
                    befores[slot][s].copy_(c)
                c = F.layer_norm(mix, (width,), stage.norm[0], stage.norm[1], _EPSILON)
                if clip is not None:
                    c.clamp_(-clip, clip)
            if holds[t]:
                c = torch.lerp(c, carried, held[t])
            carried = contexts[t].copy_(c)
        if kept:
            ctx.save_for_backward(keep, held, masks, hidden, gates, mixed, before, *flat)
            ctx.settings = clip, num_hidden, resets, holds
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_context,) = grads
        keep, held, masks, hidden, gates, mixed, before, *flat = ctx.saved_tensors
        clip, num_hidden, resets, holds = ctx.settings
        stages = _stages(tuple(flat), num_hidden)
        num_positions, num_stages, _, _, hidden_width = hidden.shape
        width = mixed.shape[-1]
        gains = torch.stack([stage.norm[0] for stage in stages])[:, None]
        normalised, mean, rstd = torch.native_layer_norm(mixed, (width,), None, None, _EPSILON)
        within = None
        if clip is not None:
            shifts = torch.stack([stage.norm[1] for stage in stages])[:, None]
            within = ((normalised * gains + shifts).abs() <= clip).to(mixed.dtype)
        delta, forget, insert = gates.unbind(dim=3)
        # d mixed / d preactivation of the three gates, in one tensor: one product a position
        slopes = torch.stack(
            [
                insert * (1.0 - delta.square()),
                before * forget * (1.0 - forget),
                delta * insert * (1.0 - insert),
            ],
            dim=3,
        )
        # relu lets through what it left above zero; dropout scales it
        lets = (hidden > 0).to(hidden.dtype)
        if masks is not None:
            lets.mul_(masks)
        to_gate = torch.empty_like(gates)
        to_hidden = torch.empty_like(hidden)
        to_norm = torch.empty_like(mixed)
        mixes, means, rstds = _grid(mixed, 2), _grid(mean, 2), _grid(rstd, 2)
        norm_rows, slope_rows = _grid(to_norm, 2), _grid(slopes, 2)
        gate_rows, flat_gate_rows = _grid(to_gate, 2), _grid(to_gate.flatten(-2), 2)
        hidden_rows, let_rows, forgets = _grid(to_hidden, 3), _grid(lets, 3), _grid(forget, 2)
        backward_norm = torch.ops.aten.native_layer_norm_backward
        carry = torch.zeros_like(grad_context[0])
        for t in range(num_positions - 1, -1, -1):
            g, past = grad_context[t] + carry, None
            if holds[t]:
                past = g * held[t]
                g = g - past
            for s in range(num_stages - 1, -1, -1):
                stage = stages[s]
                if within is not None:
                    g = g * within[t, s]
                norm_rows[t][s].copy_(g)
                (g_mixed, _, _) = backward_norm(
                    g, mixes[t][s], (width,), means[t][s], rstds[t][s], stage.norm[0],
                    stage.norm[1], (True, False, False),
                )  # fmt: skip
                torch.mul(slope_rows[t][s], g_mixed[:, None], out=gate_rows[t][s])
                h = hidden_rows[t][s]
                torch.mm(flat_gate_rows[t][s], stage.gate[0], out=h[-1])
                h[-1].mul_(let_rows[t][s][-1])
                for i in range(num_hidden - 1, 0, -1):
                    torch.mm(h[i], stage.hidden[i - 1][0], out=h[i - 1])
                    h[i - 1].mul_(let_rows[t][s][i - 1])
                g = torch.addmm(g_mixed.mul_(forgets[t][s]), h[0], stage.from_context)
            if past is not None:
                g = g + past
            carry = g * keep[t] if resets[t] else g
        found: list[Tensor] = []
        for s in range(num_stages):
            parts = [to_hidden[:, s, i].reshape(-1, hidden_width) for i in range(num_hidden)]
            inner = [hidden[:, s, i].reshape(-1, hidden_width) for i in range(num_hidden)]
            flat_gate = to_gate[:, s].reshape(-1, 3 * width)
            found.append(parts[0].T @ before[:, s].reshape(-1, width))
            for i in range(1, num_hidden):
                found += [parts[i].T @ inner[i - 1], parts[i].sum(dim=0)]
            found += [flat_gate.T @ inner[-1], flat_gate.sum(dim=0)]
            found += [
                (to_norm[:, s] * normalised[:, s]).sum(dim=(0, 1)),
                to_norm[:, s].sum(dim=(0, 1)),
            ]
        return to_hidden[:, :, 0], carry, None, None, None, None, None, *found


def _grid(buffer: Tensor, depth: int) -> Any:
    """Return views of a buffer along its first dimensions, nested."""
    if depth == 1:
        return buffer.unbind()
    return [_grid(row, depth - 1) for row in buffer.unbind()]


def _any_held(held: Tensor | None, num_positions: int) -> list[bool]:
    if held is None:
        return [False] * num_positions
    return held.flatten(1).any(dim=1).tolist()
