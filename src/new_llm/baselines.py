"""Peers, as they are commonly used: what the benchmarks compare with.

Layers map `[B, T, C]` to `[B, T, C]`. Axes as in `recurrence`; `N` attention heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .recurrence import linear_scan
from .stepper import layer_norm


class MinGRU(nn.Module):
    """`h_t = (1 - z_t) h_{t-1} + z_t h~_t`, gate and candidate from the input alone.

    Source: "Were RNNs all we needed?" (arXiv:2410.01201); the recurrence by an exact parallel scan
    in place of logarithms, forwards and backwards.

    >>> MinGRU(4)(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, C]` for `[B, T, C]`."""
        candidate, gate = self.both(x.transpose(0, 1)).chunk(2, dim=-1)
        gate = torch.sigmoid(gate)
        return linear_recurrence(1.0 - gate, gate * candidate).transpose(0, 1)


def linear_recurrence(decay: Tensor, source: Tensor) -> Tensor:
    """Return `c_t = decay_t c_{t-1} + source_t` from zero, differentiable, all `[T, ...]`.

    >>> linear_recurrence(torch.full((3, 1), 0.5), torch.ones(3, 1))[:, 0].tolist()
    [1.0, 1.5, 1.75]
    """
    found: Any = _LinearRecurrence.apply(decay, source)
    return found


class _LinearRecurrence(torch.autograd.Function):
    """`c_t = decay_t c_{t-1} + source_t` from zero, time-major, both ways in parallel."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        decay, source = inputs
        context = linear_scan(decay, source, torch.zeros_like(source[0]))
        ctx.save_for_backward(decay, context)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        decay, context = ctx.saved_tensors
        zero = torch.zeros_like(decay[:1])
        after = torch.cat([decay[1:], zero]).flip(0)
        total = linear_scan(after, grads[0].flip(0), zero[0]).flip(0)
        return total * torch.cat([zero, context[:-1]]), total


def selective_scan(
    x: Tensor,
    step: Tensor,
    rates: Tensor,
    writes: Tensor,
    reads: Tensor,
    initial: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run Mamba's recurrence `s_t = exp(step_t A) s_{t-1} + step_t x_t B_t`, `y_t = C_t s_t`.

    Args:
        x: what is written, a number a channel, `[T, B, C]`.
        step: how long each position lasts, `[T, B, C]`; 0 holds the state.
        rates: A, of each number of a channel, `[N, C]`.
        writes: B, `[T, B, N]`.
        reads: C, `[T, B, N]`.
        initial: state before the first position, `[B, N, C]`.
        starts: where the state before counts as zero, `[T, B]` bool.

    Returns:
        `[T, B, C]`, and the last state, `[B, N, C]`.

    Source: Mamba (arXiv:2312.00752). One position after another, in both directions: what a
    position works on stays in the cache of a core, where a parallel scan passes over all states of
    a text again and again.

    >>> ones = torch.ones(3, 1, 1)
    >>> none = torch.zeros(3, 1, dtype=torch.bool)
    >>> y, _ = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones, torch.zeros(1, 1, 1), none)
    >>> y.flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    found: Any = _SelectiveScan.apply(
        x * step, step, rates.contiguous(), writes, reads, initial, starts
    )
    return found


class _SelectiveScan(torch.autograd.Function):
    """States are `[N, C]` a sequence, so that what is the same for all N runs along memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        written, step, rates, writes, reads, initial, starts = inputs
        kept = any(ctx.needs_input_grad)
        y = torch.empty_like(written)
        states = initial.new_empty(len(y) + 1 if kept else 2, *initial.shape)
        states[0] = initial
        resets = starts.any(dim=1).tolist()
        keep = (~starts).to(initial.dtype)[..., None, None]
        decay = torch.empty_like(initial)
        for t in range(len(y)):
            before, after = (states[t], states[t + 1]) if kept else (states[0], states[0])
            _decay(step[t], rates, keep[t] if resets[t] else None, out=decay)
            torch.mul(before, decay, out=after)
            after.baddbmm_(writes[t, :, :, None], written[t, :, None])
            torch.bmm(reads[t, :, None], after, out=y[t, :, None])
        if kept:
            ctx.save_for_backward(written, step, rates, writes, reads, states, keep)
            ctx.resets = resets
        return y, states[-1 if kept else 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        written, step, rates, writes, reads, states, keep = ctx.saved_tensors
        to_y, to_state = grads
        to_written, to_step = torch.empty_like(written), torch.empty_like(step)
        to_writes, to_reads = torch.empty_like(writes), torch.empty_like(reads)
        to_rates = torch.zeros_like(states[0])
        total = to_state.clone()
        decay = torch.empty_like(total)
        for t in range(len(to_y) - 1, -1, -1):
            total.baddbmm_(reads[t, :, :, None], to_y[t, :, None])
            torch.bmm(states[t + 1], to_y[t, :, :, None], out=to_reads[t, :, :, None])
            torch.bmm(total, written[t, :, :, None], out=to_writes[t, :, :, None])
            torch.bmm(writes[t, :, None], total, out=to_written[t, :, None])
            _decay(step[t], rates, keep[t] if ctx.resets[t] else None, out=decay)
            total.mul_(decay)
            # of step_t A, whose exponential the decay is
            torch.mul(total, states[t], out=decay)
            to_rates.addcmul_(decay, step[t, :, None])
            torch.sum(decay.mul_(rates), dim=1, out=to_step[t])
        return to_written, to_step, to_rates.sum(dim=0), to_writes, to_reads, total, None


def _decay(step: Tensor, rates: Tensor, keep: Tensor | None, *, out: Tensor) -> None:
    """Write which share of a state is kept, `[B, N, C]`; none of it at a start."""
    torch.mul(step[:, None], rates, out=out).exp_()
    if keep is not None:
        out.mul_(keep)


class GPTBlock(nn.Module):
    """Causal attention and an MLP of four widths, norms before each, residuals around each.

    Source: GPT-2 (Radford et al. 2019), with `scaled_dot_product_attention` and rotary positions
    (arXiv:2104.09864).

    >>> GPTBlock(8, num_heads=2)(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, *, num_heads: int = 4, mlp_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        mlp_width = 4 * width if mlp_width is None else mlp_width
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, C]` for `[B, T, C]`."""
        turn = rotation(x.shape[1], x.shape[-1] // self.num_heads, like=x)
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            rotate(query, *turn), rotate(key, *turn), value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.mlp_norm(x)), approximate="tanh"))


def rotation(length: int, width: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of rotary positions, `[T, width]` each."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angle = torch.arange(length, device=like.device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1).to(like.dtype)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs of coordinates by their position, `[..., T, width]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class GPT(nn.Module):
    """Blocks between a tied embedding and read-out.

    >>> GPT(50, 8, num_blocks=2, num_heads=2)(torch.tensor([[3, 1, 4]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        num_blocks: int,
        num_heads: int = 4,
        mlp_width: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            GPTBlock(width, num_heads=num_heads, mlp_width=mlp_width) for _ in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[B, T, V]` of token ids `[B, T]`."""
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return F.linear(self.final_norm(h), self.embedding.weight)


class GPTStepper:
    """A tight loop for one text: keys and values are kept, only what a token needs is computed.

    Args:
        model: its weights must not change from here on.
        length: most positions.

    >>> model = GPT(50, 8, num_blocks=2, num_heads=2)
    >>> step = GPTStepper(model, 3)
    >>> logits = [step(token) for token in (3, 1, 4)]
    >>> torch.allclose(torch.stack(logits), model(torch.tensor([[3, 1, 4]]))[0], atol=1e-5)
    True
    """

    @torch.no_grad()
    def __init__(self, model: GPT, length: int) -> None:
        self.embedding = model.embedding.weight.detach()
        # columns, so that the product runs along memory
        self.readout = self.embedding.T.contiguous().T
        self.final_norm = layer_norm(model.final_norm)
        self.blocks = [_GPTBlockStep(block, length) for block in model.blocks]
        self.position = 0

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        """Read a token; return logits `[V]`."""
        h = self.embedding[token]
        for block in self.blocks:
            h = block(h, self.position)
        self.position += 1
        return torch.mv(self.readout, self.final_norm(h))


class _GPTBlockStep:
    def __init__(self, block: Any, length: int) -> None:
        width, heads = block.qkv.in_features, block.num_heads
        self.heads, self.size = heads, width // heads
        self.keys = block.qkv.weight.new_zeros(heads, length, self.size)
        self.values = torch.zeros_like(self.keys)
        self.cosine, self.sine = rotation(length, self.size, like=block.qkv.weight)
        self.norm, self.mlp_norm = layer_norm(block.attention_norm), layer_norm(block.mlp_norm)
        self.qkv, self.out, self.wide, self.narrow = (
            (linear.bias.detach(), linear.weight.detach())
            for linear in (block.qkv, block.out, block.wide, block.narrow)
        )

    def __call__(self, h: Tensor, position: int) -> Tensor:
        parts = torch.addmv(*self.qkv, self.norm(h)).view(3, self.heads, self.size)
        turned = rotate(parts[:2], self.cosine[position], self.sine[position])
        self.keys[:, position], self.values[:, position] = turned[1], parts[2]
        mixed = F.scaled_dot_product_attention(
            turned[0][None, :, None],
            self.keys[None, :, : position + 1],
            self.values[None, :, : position + 1],
        )
        bias, weight = self.out
        h = (h + bias).addmv_(weight, mixed.flatten())
        inner = F.gelu(torch.addmv(*self.wide, self.mlp_norm(h)), approximate="tanh")
        bias, weight = self.narrow
        return h.add_(bias).addmv_(weight, inner)
