"""Every peer keeps the contract of a language model: it is trained and scored as ours is."""

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import store_of
from new_llm.baselines import selective_scan
from new_llm.config import PeerConfig
from new_llm.evaluate import evaluate
from new_llm.model import token_losses
from new_llm.peers import Peer

KINDS = get_args(get_type_hints(PeerConfig)["kind"])
V = 30


def small_peer(kind: str, **changed: int) -> Peer:
    torch.manual_seed(0)
    config = PeerConfig(
        kind=kind,  # pyright: ignore[reportArgumentType]
        **{"embedding_width": 16, "width": 16, "mlp_width": 24, "window": 64, **changed},
    )
    peer = Peer(config, V).eval()
    with torch.no_grad():
        # at the start an MLP adds nothing
        for block in peer.stages():
            assert block.mlp is not None
            torch.nn.init.normal_(block.mlp.narrow.weight)
    return peer


def text(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, starts and real of lanes that hold several dialogues and end in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (batch, length), generator=generator)
    starts = torch.rand(batch, length, generator=generator) < 0.2
    ends = torch.randint(length + 1, (batch, 1), generator=generator)
    real = torch.arange(length) < ends
    return ids, starts & real, real


@pytest.mark.parametrize("kind", KINDS)
def test_a_dialogue_knows_nothing_of_others_nor_of_what_follows(kind: str) -> None:
    peer = small_peer(kind)
    ids, starts, real = text(4, 23)
    found = peer(ids, starts=starts, real=real).features
    for lane in range(len(ids)):
        begins = sorted({0, *starts[lane].nonzero()[:, 0].tolist()})
        length = int(real[lane].sum())
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            for stop in {end, (begin + end + 1) // 2}:
                if begin < stop:
                    alone = peer(ids[None, lane, begin:stop]).features[0]
                    torch.testing.assert_close(found[lane, begin:stop], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 22))
def test_what_is_carried_is_all_that_is_remembered(kind: str, seed: int, cut: int) -> None:
    peer = small_peer(kind)
    ids, starts, real = text(3, 23, seed)
    whole = peer(ids, starts=starts, real=real)
    first = peer(ids[:, :cut], starts=starts[:, :cut], real=real[:, :cut])
    second = peer(ids[:, cut:], first.context, starts=starts[:, cut:], real=real[:, cut:])
    found = torch.cat([first.features, second.features], dim=1)
    torch.testing.assert_close(found[real], whole.features[real], atol=1e-5, rtol=1e-4)


# attention carries positions, padding among them, which it does not read
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt"])
def test_padding_holds_what_is_carried(kind: str) -> None:
    peer = small_peer(kind)
    ids, starts, real = text(5, 23)
    found = peer(ids, starts=starts, real=real).context
    lengths = real.sum(dim=1).tolist()
    assert min(lengths) < 23
    for lane, length in enumerate(lengths):
        part = (slice(lane, lane + 1), slice(0, length))
        alone = peer(ids[part], starts=starts[part]).context if length else peer.initial_context(1)
        torch.testing.assert_close(found[lane], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_precision_is_nearly_the_same(kind: str) -> None:
    ids, starts, real = text(3, 23)
    found = []
    for wide in (True, False):
        peer = small_peer(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=wide):
            output = peer(ids, starts=starts, real=real)
        assert output.context.dtype == torch.float32
        output.features.float().sin().sum().backward()
        grads = [p.grad.flatten() for p in peer.parameters() if p.grad is not None]
        found.append([output.features[real].float(), torch.cat(grads)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()


def test_mamba_is_the_layer_of_transformers() -> None:
    mixer: Any = small_peer("mamba").stages()[0].cell
    x = torch.randn(3, 23, 16)
    no, yes = torch.zeros(3, 23, dtype=torch.bool), torch.ones(3, 23, dtype=torch.bool)
    found = []
    for mixed in (mixer(x, mixer.initial(3), no, yes)[0], mixer.inner(x)):
        mixer.zero_grad()
        mixed.sin().sum().backward()
        found.append([mixed, *(p.grad for p in mixer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def selective_by_steps(
    x: Tensor, step: Tensor, rates: Tensor, writes: Tensor, reads: Tensor, state: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = []
    for t in range(len(x)):
        state = state.masked_fill(starts[t, :, None, None], 0.0)
        decay = torch.exp(step[t, :, None] * rates)
        state = decay * state + (step[t] * x[t])[:, None] * writes[t, :, :, None]
        found.append((reads[t, :, :, None] * state).sum(dim=1))
    return torch.stack(found), state


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000), length=st.integers(1, 9), batch=st.integers(1, 4),
    channels=st.integers(1, 5), size=st.integers(1, 4),
)  # fmt: skip
def test_selective_scan_is_one_step_after_another(
    seed: int, length: int, batch: int, channels: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [
        drawn(length, batch, channels), drawn(length, batch, channels).abs(),
        -drawn(size, channels).abs(), drawn(length, batch, size), drawn(length, batch, size),
        drawn(batch, size, channels),
    ]  # fmt: skip
    starts = torch.rand(length, batch, generator=generator) < 0.3
    share, last = drawn(length, batch, channels), drawn(batch, size, channels)
    found = []
    runs: tuple[Any, ...] = (selective_scan, selective_by_steps)
    for run in runs:
        leaves = [each.clone().requires_grad_() for each in inputs]
        mixed, state = run(*leaves, starts)
        total = (mixed * share).sum() + (state * last).sum()
        found.append([mixed, state, *torch.autograd.grad(total, leaves)])
        with torch.no_grad():
            found[-1] += run(*inputs, starts)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["lstm", "gru", "mingru"])
def test_units_keep_for_times_from_a_token_to_the_longest(kind: str) -> None:
    torch.manual_seed(0)
    config = PeerConfig(
        kind=kind,  # pyright: ignore[reportArgumentType]
        embedding_width=16, width=64, mlp_width=0, num_blocks=1, longest_timescale=50.0,
    )  # fmt: skip
    mixer: Any = Peer(config, V).stages()[0].cell
    nothing = torch.zeros(1, 1, 16)
    no, yes = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)

    def after(context: float) -> Tensor:
        before = mixer.initial(1)
        # of an LSTM the cell, which stands behind what it shows
        before.view(1, -1, 64)[:, -1] = context
        return mixer(nothing, before, no, yes)[1].view(1, -1, 64)[0, -1]

    with torch.no_grad():
        if kind == "gru":
            # its candidate reads the context too
            mixer.layer.weight_hh_l0.zero_()
        kept = (after(1e-3) - after(0.0)) / 1e-3
    timescale = -1.0 / kept.double().log()
    assert torch.allclose(timescale[[0, -1]], torch.tensor([1.0, 50.0]).double(), rtol=0.05)
    assert (timescale.diff() > 0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_carried_is_the_same_in_training(kind: str) -> None:
    peer = small_peer(kind)
    ids, starts, real = text(2, 20)
    contexts = []
    for mode in (True, False):
        peer.train(mode)
        first = peer(ids[:, :9], starts=starts[:, :9], real=real[:, :9])
        second = peer(ids[:, 9:], first.context.detach(), starts=starts[:, 9:], real=real[:, 9:])
        contexts.append((second.features, second.context))
    for one, other in zip(*contexts, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_reaches_as_far_as_its_window() -> None:
    peer = small_peer("gpt", window=4, num_blocks=1)
    ids = torch.randint(V, (1, 12))
    before = peer(ids).features
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % V
    moved = (peer(other).features - before).abs().amax(dim=-1)[0]
    assert (moved > 1e-6).nonzero()[:, 0].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_learn(kind: str) -> None:
    peer = small_peer(kind)
    peer.train()
    ids = (torch.arange(40)[None] + torch.tensor([[0], [3]])) % 7
    optimiser = torch.optim.Adam(peer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        features = peer(ids[:, :-1]).features.flatten(0, 1)
        ones = torch.full((len(features),), 1.0 / len(features))
        loss = token_losses(
            features, peer.readout.weight, ids[:, 1:].flatten(), ones, chunk=64
        ).loss
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in peer.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_segments(kind: str) -> None:
    peer = small_peer(kind)
    generator = np.random.default_rng(0)
    store = store_of([generator.integers(V, size=n).tolist() for n in (9, 31, 2, 14, 50)])
    whole = evaluate(peer, store, batch_size=2, segment_length=64)
    cut = evaluate(peer, store, batch_size=2, segment_length=8)
    assert cut.loss == pytest.approx(whole.loss, abs=1e-5)
    assert cut.num_tokens == whole.num_tokens
