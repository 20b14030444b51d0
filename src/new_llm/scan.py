"""Sequence scope, one position after another: `c_t = f(c_{t-1}, x_t)` with exact gradients.

The law that every other engine is compared with. At the start of a dialogue the previous context
counts as zero; padding holds the context. Axes: `B` sequences, `T` positions, `C` context width,
`P` width of a projected token, `H` hidden width, `S` stages of a seed cell.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cell import ACTIVATIONS, BOUND, ContextCell, ConvexCell, SeedCell, Stage, Weights

# rows, positions times sequences, whose intermediate results a backward pass holds at once
BLOCK_ROWS = 512


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
    token_part, share, forget = (part.transpose(0, 1) for part in cell.parts(projected))
    if real is not None:
        forget = forget.masked_fill(~real.T[..., None], 1.0)
    keep = None if starts is None else (~starts.T[..., None]).to(projected.dtype)
    contexts: Any = _ConvexScan.apply(
        token_part.contiguous(),
        share.contiguous(),
        forget.contiguous(),
        initial,
        *weights,
        keep,
        cell.activation,
    )
    return contexts.transpose(0, 1)


class _ConvexScan(torch.autograd.Function):
    """`c_t = forget_t c_{t-1} + (1 - forget_t) (W_d phi(u_t + g_t (W_c c_{t-1})) + b_d)`.

    The last bracket, `delta`, is cut at `BOUND`. Time-major: token part `u` and share `g`
    `[T, B, H]`, forget `[T, B, C]`, keep `[T, B, 1]` (0 at a start) or None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        token_part, share, forget, initial, from_context, to_delta, bias, keep, activation = inputs
        num_positions, batch, width = forget.shape
        phi = ACTIVATIONS[activation]
        resets = _any(keep, 0, num_positions)
        from_context_t, to_delta_t = from_context.T.contiguous(), to_delta.T.contiguous()
        # what only a backward pass reads is not kept where none comes
        kept = any(ctx.needs_input_grad)
        # what is read of the context, before and after the token's share of it and its own part
        read = torch.empty_like(token_part if kept else token_part[:1])
        preactivation = torch.empty_like(read)
        delta = torch.empty_like(forget if kept else forget[:1])
        # slot t holds the context before position t, slot t + 1 the one after it
        context = forget.new_empty(num_positions + 1, batch, width)
        context[0] = initial
        # views are taken at once: each costs as much as a small product
        contexts = context.unbind()
        rows = zip(
            token_part.unbind(), share.unbind(), forget.unbind(), contexts, contexts[1:],
            _rows(read, num_positions), _rows(preactivation, num_positions),
            _rows(delta, num_positions), resets, strict=False,
        )  # fmt: skip
        for t, (
            token_t,
            share_t,
            forget_t,
            before,
            after,
            read_t,
            pre,
            delta_t,
            reset,
        ) in enumerate(rows):
            if reset:
                before = before * keep[t]
            torch.mm(before, from_context_t, out=read_t)
            torch.addcmul(token_t, share_t, read_t, out=pre)
            torch.addmm(bias, phi(pre), to_delta_t, out=delta_t).clamp_(-BOUND, BOUND)
            torch.lerp(delta_t, before, forget_t, out=after)
        if kept:
            ctx.save_for_backward(
                share, forget, context, read, preactivation, delta, from_context, to_delta, keep
            )
            ctx.activation, ctx.resets = activation, resets
        return context[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_context,) = grads
        (share, forget, context, read, preactivation, delta, from_context, to_delta,
         keep) = ctx.saved_tensors  # fmt: skip
        num_positions, batch, _ = forget.shape
        carry = torch.zeros_like(context[0])
        to_token, to_share = torch.empty_like(preactivation), torch.empty_like(preactivation)
        to_forget = torch.empty_like(forget)
        to_weights = [torch.zeros_like(from_context), torch.zeros_like(to_delta),
                      torch.zeros_like(to_delta[:, 0])]  # fmt: skip
        # whole buffers leave the caches: all that is done with a few positions is done at once
        size = max(1, BLOCK_ROWS // batch)
        for begin in reversed(range(0, num_positions, size)):
            block = slice(begin, min(begin + size, num_positions))
            before = context[block] if keep is None else context[block] * keep[block]
            hidden, slope = activated(preactivation[block], ctx.activation)
            reach = delta_share(forget[block], delta[block])
            total, to_bias = torch.empty_like(reach), torch.empty_like(reach)
            to_hidden, to_read = torch.empty_like(slope), torch.empty_like(slope)
            rows = [*zip(
                grad_context[block].unbind(), total.unbind(), reach.unbind(), to_bias.unbind(),
                to_hidden.unbind(), (slope * share[block]).unbind(), to_read.unbind(),
                forget[block].unbind(), ctx.resets[block], strict=True,
            )]  # fmt: skip
            for t in range(len(rows) - 1, -1, -1):
                (grad_t, total_t, reach_t, bias_t, hidden_t, slope_t, read_t, forget_t,
                 reset) = rows[t]  # fmt: skip
                torch.add(grad_t, carry, out=total_t)
                torch.mul(total_t, reach_t, out=bias_t)
                torch.mm(bias_t, to_delta, out=hidden_t)
                torch.mul(hidden_t, slope_t, out=read_t)
                torch.addmm(total_t * forget_t, read_t, from_context, out=carry)
                if keep is not None and reset:
                    carry.mul_(keep[begin + t])
            torch.mul(to_hidden, slope, out=to_token[block])
            torch.mul(to_token[block], read[block], out=to_share[block])
            to_forget[block], *parts = convex_gradients(
                total, to_bias, to_read, before=before, hidden=hidden, delta=delta[block]
            )
            for sum_, part in zip(to_weights, parts, strict=True):
                sum_ += part
        return to_token, to_share, to_forget, carry, *to_weights, None, None


class _Tanh:
    """`tanh` in place, of arguments that `scaled` weights made.

    From some thousand numbers on a CPU, `2 sigmoid(2 x) - 1` takes a third of the time; both differ
    by less than 2e-7.
    """

    def __init__(self, like: Tensor) -> None:
        self.by_sigmoid = not like.is_cuda and like.numel() >= 2048
        self.minus_one = -torch.ones_like(like[:1, :1])

    def scaled(self, weight: Tensor) -> Tensor:
        return 2.0 * weight if self.by_sigmoid else weight

    def of_gates(self, gates: Tensor, delta: Tensor) -> None:
        """Apply it to the first of three gates `[3, B, C]`, which `delta` is, sigmoid to others."""
        if self.by_sigmoid:
            gates.sigmoid_()
            torch.add(self.minus_one, delta, alpha=2.0, out=delta)
        else:
            delta.tanh_()
            gates[1:].sigmoid_()


def delta_share(forget: Tensor, delta: Tensor) -> Tensor:
    """Return the share of delta in the new context; nothing passes where it was cut.

    >>> delta_share(torch.tensor([0.75, 0.75]), torch.tensor([1.0, BOUND]))
    tensor([0.2500, 0.0000])
    """
    return (1.0 - forget).mul_(delta.abs() < BOUND)


def convex_gradients(
    total: Tensor,
    to_bias: Tensor,
    to_read: Tensor,
    *,
    before: Tensor,
    hidden: Tensor,
    delta: Tensor,
) -> tuple[Tensor, ...]:
    """Return gradients of ConvexCell's gate and weights, one product each for all positions.

    Args:
        total: gradient of the context after each position, `[T, B, C]`.
        to_bias: of delta before it is cut, `[T, B, C]`.
        to_read: of `W_c c`, `[T, B, H]`.
        before: context that each position read, `[T, B, C]`.
        hidden: `phi` at each position, `[T, B, H]`.
        delta: what each position would have settled at, `[T, B, C]`.
    """
    flat_bias, flat_read = to_bias.flatten(0, 1), to_read.flatten(0, 1)
    return (
        total * (before - delta),
        flat_read.T @ before.flatten(0, 1),
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


def _any(mask: Tensor | None, value: int, num_positions: int) -> list[bool]:
    """Return at which positions a mask `[T, B, 1]` has a value in any sequence."""
    if mask is None:
        return [False] * num_positions
    return (mask == value).flatten(1).any(dim=1).tolist()


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
    token_part = projected.unflatten(-1, (len(stages), -1)).permute(2, 1, 0, 3).contiguous()
    keep = None if starts is None else (~starts.T[..., None]).to(projected.dtype)
    held = None if real is None else (~real.T[..., None]).to(projected.dtype)
    num_hidden = len(stages[0].hidden) + 1
    masks = None
    if cell.training and cell.dropout > 0.0:
        shape = (len(stages), num_hidden, length, batch, token_part.shape[-1])
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

    Stage- and time-major: token part `[S, T, B, H]`; keep `[T, B, 1]` (0 at a start), held
    `[T, B, 1]` (1 at padding), dropout masks `[S, L, T, B, H]`, each or None; the tensors of all
    stages in a row.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        token_part, initial, keep, held, masks, clip, num_hidden, *flat = inputs
        stages = _stages(tuple(flat), num_hidden)
        num_stages, num_positions, batch, hidden_width = token_part.shape
        width = initial.shape[-1]
        resets, holds = _any(keep, 0, num_positions), _any(held, 1, num_positions)
        tanh = _Tanh(initial)
        # what only a backward pass reads is not kept where none comes
        kept = any(ctx.needs_input_grad)
        slots = num_positions if kept else 1
        hidden = initial.new_empty(num_stages, num_hidden, slots, batch, hidden_width)
        gates = initial.new_empty(num_stages, 3, slots, batch, width)
        mixed = initial.new_empty(num_stages, slots, batch, width)
        # what the stages after the first read
        between = initial.new_empty(num_stages - 1, slots, batch, width)
        # slot t holds the context before position t, slot t + 1 the one after it
        context = initial.new_empty(num_positions + 1, batch, width)
        context[0] = initial
        # views are taken at once: each costs as much as a small product
        contexts = context.unbind()
        steps = [
            _StageStep(
                stage,
                tanh,
                clip,
                parts=token_part[s].unbind(),
                hidden=[_rows(layer, num_positions) for layer in hidden[s].unbind()],
                gates=_rows(gates[s].transpose(0, 1), num_positions),
                mixed=_rows(mixed[s], num_positions),
                masks=None if masks is None else [layer.unbind() for layer in masks[s]],
            )
            for s, stage in enumerate(stages)
        ]
        reads = [_rows(part, num_positions) for part in between.unbind()]
        for t in range(num_positions):
            before = contexts[t] * keep[t] if resets[t] else contexts[t]
            c = steps[0](t, before)
            for step, rows in zip(steps[1:], reads, strict=True):
                c = step(t, rows[t].copy_(c))
            contexts[t + 1].copy_(torch.lerp(c, before, held[t]) if holds[t] else c)
        if kept:
            ctx.save_for_backward(keep, held, masks, hidden, gates, mixed, between, context, *flat)
            ctx.settings = clip, num_hidden, resets, holds
        return context[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_context,) = grads
        keep, held, masks, hidden, gates, mixed, between, context, *flat = ctx.saved_tensors
        clip, num_hidden, resets, holds = ctx.settings
        stages = _stages(tuple(flat), num_hidden)
        _, _, num_positions, batch, _ = hidden.shape
        to_token = torch.empty_like(hidden[:, 0])
        sums = [torch.zeros_like(part) for part in flat]
        carry = torch.zeros_like(grad_context[0])
        # whole buffers leave the caches: all that is done with a few positions is done at once
        size = max(1, BLOCK_ROWS // batch)
        for begin in reversed(range(0, num_positions, size)):
            block = slice(begin, min(begin + size, num_positions))
            first = context[block] if keep is None else context[block] * keep[block]
            backs = [
                _StageBack(
                    stage,
                    clip,
                    before=first if s == 0 else between[s - 1, block],
                    hidden=hidden[s, :, block],
                    gates=gates[s, :, block],
                    mixed=mixed[s, block],
                    masks=None if masks is None else masks[s, :, block],
                )
                for s, stage in enumerate(stages)
            ]
            for t in range(block.stop - 1, begin - 1, -1):
                total = grad_context[t] + carry
                g, past = total, None
                if holds[t]:
                    past = total * held[t]
                    g = total - past
                for back in reversed(backs):
                    g = back(t - begin, g)
                if past is not None:
                    g = g + past
                carry = g * keep[t] if keep is not None and resets[t] else g
            shares = []
            for s, back in enumerate(backs):
                to_token[s, block] = back.to_hidden[0]
                shares += back.to_weights()
            for sum_, share in zip(sums, shares, strict=True):
                sum_ += share
        return to_token, carry, None, None, None, None, None, *sums


class _StageStep:
    """One stage at one position after another, forwards, into rows of buffers."""

    def __init__(
        self,
        stage: Stage,
        tanh: "_Tanh",
        clip: float | None,
        *,
        parts: Sequence[Tensor],
        hidden: list[list[Tensor]],
        gates: list[Tensor],
        mixed: list[Tensor],
        masks: list[Sequence[Tensor]] | None,
    ) -> None:
        width = stage.gate[1].shape[0] // 3
        self.norm, self.tanh, self.clip = stage.norm, tanh, clip
        self.parts, self.hidden, self.mixed, self.masks = parts, hidden, mixed, masks
        self.gates = gates
        self.each_gate = [gate.unbind() for gate in gates]
        self.from_context = stage.from_context.T.contiguous()
        self.layers = [(bias, weight.T.contiguous()) for weight, bias in stage.hidden]
        # a product a gate: each then writes one piece of memory
        self.to_gates = [
            (bias, weight.T.contiguous())
            for weight, bias in zip(
                stage.gate[0].split(width), stage.gate[1].split(width), strict=True
            )
        ]
        bias, weight = self.to_gates[0]
        self.to_gates[0] = tanh.scaled(bias), tanh.scaled(weight)

    def __call__(self, t: int, context: Tensor) -> Tensor:
        h = torch.addmm(self.parts[t], context, self.from_context, out=self.hidden[0][t]).relu_()
        if self.masks is not None:
            h.mul_(self.masks[0][t])
        for i, (bias, weight) in enumerate(self.layers, start=1):
            h = torch.addmm(bias, h, weight, out=self.hidden[i][t]).relu_()
            if self.masks is not None:
                h.mul_(self.masks[i][t])
        delta, forget, insert = self.each_gate[t]
        for (bias, weight), gate in zip(self.to_gates, (delta, forget, insert), strict=True):
            torch.addmm(bias, h, weight, out=gate)
        self.tanh.of_gates(self.gates[t], delta)
        mixed = torch.mul(forget, context, out=self.mixed[t]).addcmul_(insert, delta)
        after = F.layer_norm(mixed, mixed.shape[-1:], self.norm[0], self.norm[1], _EPSILON)
        return after if self.clip is None else after.clamp_(-self.clip, self.clip)


class _StageBack:
    """One stage at one position after another, backwards, over a block of positions."""

    def __init__(
        self,
        stage: Stage,
        clip: float | None,
        *,
        before: Tensor,
        hidden: Tensor,
        gates: Tensor,
        mixed: Tensor,
        masks: Tensor | None,
    ) -> None:
        self.stage, self.before, self.hidden = stage, before, hidden
        self.width = mixed.shape[-1:]
        gain, shift = stage.norm
        self.normalised, mean, rstd = torch.native_layer_norm(
            mixed, self.width, None, None, _EPSILON
        )
        self.within = None
        if clip is not None:
            within = (self.normalised * gain + shift).abs() <= clip
            self.within = within.to(mixed.dtype).unbind()
        delta, forget, insert = gates
        # d mixed / d preactivation of each gate
        slopes = torch.empty_like(gates)
        torch.mul(insert, 1.0 - delta.square(), out=slopes[0])
        torch.mul(before, (1.0 - forget).mul_(forget), out=slopes[1])
        torch.mul(delta, (1.0 - insert).mul_(insert), out=slopes[2])
        # relu lets through what it left above zero; dropout scales it
        lets = (hidden > 0).to(hidden.dtype)
        if masks is not None:
            lets.mul_(masks)
        self.to_gates, self.to_hidden = torch.empty_like(slopes), torch.empty_like(lets)
        self.to_norm = torch.empty_like(mixed)
        self.norms = [
            *zip(self.to_norm.unbind(), mixed.unbind(), mean.unbind(), rstd.unbind(), strict=True)
        ]
        self.forgets = forget.unbind()
        self.slopes = slopes.transpose(0, 1).unbind()
        self.gate_rows = self.to_gates.transpose(0, 1).unbind()
        self.each_gate = [rows.unbind() for rows in self.gate_rows]
        self.lets = [layer.unbind() for layer in lets]
        self.hidden_rows = [layer.unbind() for layer in self.to_hidden]
        self.gate_weights = stage.gate[0].split(self.width[0])

    def __call__(self, t: int, g: Tensor) -> Tensor:
        if self.within is not None:
            g = g * self.within[t]
        kept, mixed, mean, rstd = self.norms[t]
        kept.copy_(g)
        gain, shift = self.stage.norm
        g, _, _ = torch.ops.aten.native_layer_norm_backward(
            g, mixed, self.width, mean, rstd, gain, shift, (True, False, False)
        )
        torch.mul(self.slopes[t], g, out=self.gate_rows[t])
        h = self.hidden_rows[-1][t]
        for i, (gate, weight) in enumerate(zip(self.each_gate[t], self.gate_weights, strict=True)):
            torch.addmm(h, gate, weight, beta=1.0 if i else 0.0, out=h)
        h.mul_(self.lets[-1][t])
        for i in range(len(self.hidden_rows) - 1, 0, -1):
            h = torch.mm(h, self.stage.hidden[i - 1][0], out=self.hidden_rows[i - 1][t])
            h.mul_(self.lets[i - 1][t])
        return torch.addmm(g.mul_(self.forgets[t]), h, self.stage.from_context)

    def to_weights(self) -> list[Tensor]:
        """Return the gradients of `_flat`, one product each for all positions."""
        inner = [layer.flatten(0, 1) for layer in self.hidden]
        parts = [layer.flatten(0, 1) for layer in self.to_hidden]
        found = [parts[0].T @ self.before.flatten(0, 1)]
        for i in range(1, len(parts)):
            found += [parts[i].T @ inner[i - 1], parts[i].sum(dim=0)]
        gates = self.to_gates.flatten(1, 2)
        found += [torch.cat([gate.T @ inner[-1] for gate in gates]), gates.sum(dim=1).flatten()]
        norm = self.to_norm.flatten(0, 1)
        return [*found, (norm * self.normalised.flatten(0, 1)).sum(dim=0), norm.sum(dim=0)]
