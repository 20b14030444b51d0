"""Peers as language models: the blocks, read-out and training of ours, another recurrence inside.

Each `Mixer` stands where our cell stands and gets all that the cell gets, so that what differs is
the recurrence. Axes: `B` sequences, `T` positions, `E` width of the stream, `D` of what a mixer
hands to the read-out; of Mamba `C` channels and `N` numbers in the state of each.
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .baselines import linear_recurrence, rotate, rotation, selective_scan
from .cell import Stacks
from .config import PeerConfig
from .model import Block, LanguageModel, ModelOutput


class Mixer(Stacks, ABC):
    """Contract: a normalised stream `[B, T, E]` to `[B, T, D]`, and what is carried on."""

    width: int
    """D."""

    @abstractmethod
    def initial(self, batch: int) -> Tensor:
        """Return what is carried before any text, `[B, ...]`."""

    @abstractmethod
    def forward(
        self, x: Tensor, carried: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mix `[B, T, E]` along T; `starts` and `real` as in `LanguageModel.forward`."""


def _kept(width: int, longest_timescale: float) -> Tensor:
    """Return biases of gates that keep units for times from 1 token to the longest, as ours do.

    Source: "Can recurrent neural networks warp time?" (arXiv:1804.11188), evenly in the logarithm.
    """
    timescale = torch.logspace(0.0, math.log10(longest_timescale), width)
    return torch.logit(torch.exp(-1.0 / timescale))


@final
class GatedMixer(Mixer):
    """`nn.LSTM` or `nn.GRU`, begun anew at every dialogue.

    PyTorch's layers cannot be reset inside a sequence: they run from one start to the next, of
    whichever sequence. (Packed sequences would do too, and take three times as long for the GRU.)
    """

    def __init__(
        self, kind: str, embedding_width: int, width: int, longest_timescale: float | None
    ) -> None:
        super().__init__()
        self.width = width
        layer = nn.LSTM if kind == "lstm" else nn.GRU
        self.layer: Any = layer(embedding_width, width)
        count = 4 if kind == "lstm" else 3
        self.stacked = {"layer.weight_ih_l0": count, "layer.weight_hh_l0": count}
        self.num_parts = 2 if kind == "lstm" else 1
        with torch.no_grad():
            if longest_timescale is not None:
                kept = _kept(width, longest_timescale)
                self.layer.bias_ih_l0[width : 2 * width] = 0.0
                # the GRU's middle gate is the share that is kept
                self.layer.bias_hh_l0[width : 2 * width] = kept
                if kind == "lstm":
                    self.layer.bias_ih_l0[:width] = 0.0
                    self.layer.bias_hh_l0[:width] = -kept
            elif kind == "lstm":
                # remembers from the start (Jozefowicz et al. 2015)
                self.layer.bias_hh_l0[width : 2 * width] = 1.0

    def initial(self, batch: int) -> Tensor:
        """Return zeros, `[B, parts, D]`."""
        return self.layer.weight_hh_l0.new_zeros(batch, self.num_parts, self.width)

    def forward(
        self, x: Tensor, carried: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run all sequences side by side; those that begin a dialogue from zero."""
        changed = starts.clone()
        changed[:, 1:] |= real[:, 1:] != real[:, :-1]
        changed[:, 0] = True
        edges = [*changed.any(dim=0).nonzero()[:, 0].tolist(), x.shape[1]]
        rows, context, mixed = x.transpose(0, 1), carried.transpose(0, 1), []
        for begin, end in pairwise(edges):
            context = context.masked_fill(starts[:, begin, None], 0.0).contiguous()
            before = (context[:1], context[1:]) if self.num_parts == 2 else context
            found, after = self.layer(rows[begin:end], before)
            after = torch.cat(after) if self.num_parts == 2 else after
            alive = real[:, begin, None]
            mixed.append(found * alive)
            context = torch.where(alive, after, context)
        return torch.cat(mixed).transpose(0, 1), context.transpose(0, 1)


@final
class MinGRUMixer(Mixer):
    """`h_t = (1 - z_t) h_{t-1} + z_t h~_t`, gate and candidate from the input alone.

    Source: "Were RNNs all we needed?" (arXiv:2410.01201).
    """

    def __init__(self, embedding_width: int, width: int, longest_timescale: float | None) -> None:
        super().__init__()
        self.width = width
        self.both = nn.Linear(embedding_width, 2 * width)
        self.stacked = {"both.weight": 2}
        if longest_timescale is not None:
            with torch.no_grad():
                self.both.bias[width:] = -_kept(width, longest_timescale)

    def initial(self, batch: int) -> Tensor:
        """Return zeros, `[B, D]`."""
        return self.both.weight.new_zeros(batch, self.width)

    def forward(
        self, x: Tensor, carried: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve the linear recurrence in parallel; padding holds."""
        candidate, gate = self.both(x.transpose(0, 1)).chunk(2, dim=-1)
        gate = torch.sigmoid(gate).masked_fill(~real.T[..., None], 0.0)
        decay = (1.0 - gate).masked_fill(starts.T[..., None], 0.0)
        source = gate * candidate
        source = torch.cat([source[:1] + decay[:1] * carried, source[1:]])
        mixed = linear_recurrence(decay, source)
        return mixed.transpose(0, 1), mixed[-1]


@final
class AttentionMixer(Mixer):
    """Causal attention within a dialogue, over the last `window` positions, rotary.

    Keys and values of the window are carried from segment to segment, without gradient, as contexts
    of recurrent models are: no position knows less than others, in training neither.

    Source: RoFormer (arXiv:2104.09864); the carried window as in Transformer-XL
    (arXiv:1901.02860).
    """

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.width, self.num_heads, self.window = width, num_heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.stacked = {"qkv.weight": 3}

    def initial(self, batch: int) -> Tensor:
        """Return no positions, `[B, 0, 2E + 1]`."""
        return self.qkv.weight.new_zeros(batch, 0, 2 * self.width + 1)

    def forward(
        self, x: Tensor, carried: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend to positions of the same dialogue, carried ones among them."""
        query, keyed = self.qkv(x).split([self.width, 2 * self.width], dim=-1)
        dialogue = starts.long().cumsum(dim=1)
        num_before = carried.shape[1]
        memory, alive = carried.split([2 * self.width, 1], dim=-1)
        # what was carried belongs to the dialogue that the segment begins with, or to none
        of = torch.cat([torch.where(alive[..., 0] > 0, 0, -1), dialogue], dim=1)
        known = torch.cat([real.new_ones(len(x), num_before), real], dim=1)
        keyed = torch.cat([memory, keyed], dim=1)
        position = torch.arange(of.shape[1], device=x.device)
        apart = position[num_before:, None] - position
        mask = (apart >= 0) & (apart < self.window)
        mask = mask & (dialogue[:, :, None] == of[:, None]) & known[:, None]
        # padding attends to itself, since nothing is no distribution
        mask = mask | (apart == 0)
        cosine, sine = rotation(of.shape[1], self.width // self.num_heads, like=x)
        key, value = self._heads(keyed).chunk(2)
        mixed = F.scaled_dot_product_attention(
            rotate(self._heads(query)[0], cosine[num_before:], sine[num_before:]),
            rotate(key[0], cosine, sine),
            value[0],
            attn_mask=mask[:, None],
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        still = (of == dialogue[:, -1:]) & known
        carried = torch.cat([keyed, still[..., None].to(keyed.dtype)], dim=-1)
        return mixed, carried[:, -self.window :]

    def _heads(self, x: Tensor) -> Tensor:
        """Return `[parts, B, N, T, E / N]` of `[B, T, parts * E]`."""
        parts = x.unflatten(-1, (-1, self.num_heads, self.width // self.num_heads))
        return parts.permute(2, 0, 3, 1, 4)


@final
class MambaMixer(Mixer):
    """The mixer of `transformers`, its recurrence by `selective_scan`; state and taps are carried.

    The layer there begins each call at zero and cannot begin a dialogue inside of one. Its own
    output map is left out: that of the block stands right behind it, and reads the gated channels.

    Source: Mamba (arXiv:2312.00752).
    """

    def __init__(self, width: int, state_size: int) -> None:
        super().__init__()
        # importing its modelling code takes seconds
        from transformers import MambaConfig
        from transformers.models.mamba import modeling_mamba

        config = MambaConfig(
            hidden_size=width, state_size=state_size, num_hidden_layers=1,
            # steps, writes and reads are three maps of one height
            time_step_rank=state_size,
        )  # fmt: skip
        self.inner: Any = modeling_mamba.MambaMixer(config, 0)
        self.inner.out_proj = nn.Identity()
        self.stacked = {"inner.in_proj.weight": 2, "inner.x_proj.weight": 3}
        self.num_taps = self.inner.conv_kernel_size - 1
        self.width = self.inner.intermediate_size

    def initial(self, batch: int) -> Tensor:
        """Return zeros: the state, and below it what the convolution read last, `[B, N + 3, C]`."""
        size = self.inner.ssm_state_size + self.num_taps
        return self.inner.in_proj.weight.new_zeros(batch, size, self.width)

    def forward(
        self, x: Tensor, carried: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Carry the state through all sequences side by side; padding holds."""
        inner = self.inner
        state, taps = carried.split([inner.ssm_state_size, self.num_taps], dim=1)
        channels, gate = inner.in_proj(x).chunk(2, dim=-1)
        channels, taps = self._convolved(channels, taps, starts, real)
        rank, size = inner.time_step_rank, inner.ssm_state_size
        step, writes, reads = inner.x_proj(channels).split([rank, size, size], dim=-1)
        step = F.softplus(inner.dt_proj(step)).masked_fill(~real[..., None], 0.0)
        # states keep their precision where the large products of a text do not
        parts = channels, step, writes, reads
        channels, step, writes, reads = (part.to(state.dtype) for part in parts)
        with torch.autocast(x.device.type, enabled=False):
            mixed, state = selective_scan(
                _time_major(channels), _time_major(step), -torch.exp(inner.A_log.T),
                _time_major(writes), _time_major(reads), state, starts.T,
            )  # fmt: skip
        mixed = mixed.transpose(0, 1) + channels * inner.D
        return mixed * F.silu(gate), torch.cat([state, taps], dim=1)

    def _convolved(
        self, channels: Tensor, taps: Tensor, starts: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolve `[B, T, C]` within dialogues; return the last real positions beside it."""
        weight: Any = self.inner.conv1d.weight[:, 0].T
        length, before = channels.shape[1], self.num_taps
        read = torch.cat([taps, channels], dim=1)
        # what was carried belongs to the dialogue that the segment begins with, or to none
        dialogue = F.pad(starts.long().cumsum(dim=1), (before, 0))
        found: Any = self.inner.conv1d.bias + channels * weight[before]
        for back in range(1, before + 1):
            part = slice(before - back, before - back + length)
            same = dialogue[:, part] == dialogue[:, before:]
            found = found + (read[:, part] * same[..., None]) * weight[before - back]
        last = real.long().sum(dim=1, keepdim=True) + torch.arange(before, device=real.device)
        kept = read.gather(1, last[..., None].expand(-1, -1, self.width))
        of = dialogue.gather(1, last)
        return F.silu(found), kept * (of == of[:, -1:])[..., None]


def _time_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def make_mixer(config: PeerConfig) -> Mixer:
    """Return a new mixer of the configured kind.

    >>> make_mixer(PeerConfig(kind="mingru", embedding_width=8, width=16)).width
    16
    """
    width = config.embedding_width
    if config.kind in ("lstm", "gru"):
        return GatedMixer(config.kind, width, config.width, config.longest_timescale)
    if config.kind == "mingru":
        return MinGRUMixer(width, config.width, config.longest_timescale)
    if config.kind == "gpt":
        return AttentionMixer(width, config.num_heads, config.window)
    return MambaMixer(width, config.width)


@final
class Peer(LanguageModel):
    """A language model of the same blocks as ours, with another recurrence.

    >>> model = Peer(PeerConfig(kind="gru", embedding_width=8, width=8, mlp_width=8), 50)
    >>> output = model(torch.tensor([[3, 1, 4], [1, 5, 9]]))
    >>> output.features.shape, output.context.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 2, 1, 8]))
    """

    def __init__(self, config: PeerConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        width = config.embedding_width
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.embedding_norm = nn.LayerNorm(width)
        mixers = [make_mixer(config) for _ in range(config.num_blocks)]
        self.blocks = nn.ModuleList(
            Block(mixer, width, mixer.width, config.mlp_width) for mixer in mixers
        )
        self.final_norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, vocab_size, bias=False)
        self.readout.weight = self.embedding.weight

    def stages(self) -> list[Block[Mixer]]:
        """Return the blocks, in the order in which a text passes them."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def initial_context(self, batch: int) -> Tensor:
        """Return what each block carries before any text, `[B, K, ...]`."""
        return torch.stack([block.cell.initial(batch) for block in self.stages()], dim=1)

    def forward(
        self,
        ids: Tensor,
        context: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> ModelOutput:
        """Read token ids `[B, T]`; padding must stand at the end."""
        if context is None:
            context = self.initial_context(len(ids))
        starts = torch.zeros_like(ids, dtype=torch.bool) if starts is None else starts
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        h = self.embedding_norm(self.embedding(ids))
        carried = []
        for block, own in zip(self.stages(), context.unbind(dim=1), strict=True):
            mixed, after = block.cell(block.norm(h), own, starts, real)
            carried.append(after)
            h = block.read(h, mixed)
        return ModelOutput(features=self.final_norm(h), context=torch.stack(carried, dim=1))
