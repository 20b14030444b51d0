import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import small_model, store_of
from new_llm.config import SampleConfig, SolverConfig
from new_llm.evaluate import evaluate, head
from new_llm.generate import Reading, read, sample, stream
from new_llm.model import NewLLM, token_losses

V = 40
CELLS = ["convex", "layerwise", "sequential"]


def make(cell: str = "convex", **changes: object) -> NewLLM:
    solver = SolverConfig(metric="mse", tolerance=0.01, max_iterations=50)
    return NewLLM(small_model(cell, **changes), V, solver).eval()


def all_models() -> list[NewLLM]:
    tokens = [make(cell, scope="token", num_blocks=1) for cell in CELLS]
    return [make(cell) for cell in CELLS] + tokens


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 9), chunk=st.integers(1, 10), vocab=st.integers(2, 12), seed=st.integers()
)
def test_chunked_cross_entropy_is_pytorchs(count: int, chunk: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    features = torch.randn(count, 5, generator=generator).requires_grad_()
    readout = torch.randn(vocab, 5, generator=generator).requires_grad_()
    targets = torch.randint(vocab, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    found = token_losses(features, readout, targets, weights, chunk=chunk)
    (3.0 * found.loss).backward()
    grads = features.grad, readout.grad
    features.grad = readout.grad = None
    logits = features @ readout.T
    nats = F.cross_entropy(logits, targets, reduction="none")
    (3.0 * (nats * weights).sum()).backward()
    torch.testing.assert_close(found.nats, nats.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads[0], features.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads[1], readout.grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.correct, logits.argmax(dim=-1) == targets)


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    gather = torch.Tensor.gather

    def watched(self: torch.Tensor, *arguments: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return gather(self, *arguments)  # pyright: ignore

    monkeypatch.setattr(torch.Tensor, "gather", watched)
    ones = torch.ones(100)
    token_losses(torch.randn(100, 4), torch.randn(50, 4), torch.zeros(100).long(), ones, chunk=8)
    assert largest == 8 * 50


@pytest.mark.parametrize("number", range(6))
def test_a_prompt_at_once_is_the_prompt_token_by_token(number: int) -> None:
    model = all_models()[number]
    ids = torch.randint(V, (3, 37))
    at_once = read(model, ids)
    piece = read(model, ids[:, :1])
    for t in range(1, 37):
        piece = read(model, ids[:, t : t + 1], piece.context)
    torch.testing.assert_close(piece.context, at_once.context, atol=1e-5, rtol=0)
    torch.testing.assert_close(piece.logits, at_once.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_single_texts(number: int, side: str) -> None:
    model = all_models()[number]
    lengths = [1, 5, 8]
    ids = torch.randint(V, (3, 8))
    places = torch.arange(8)
    real = torch.stack([places >= 8 - n if side == "left" else places < n for n in lengths])
    together = read(model, ids, real=real)
    for row, there in enumerate(real):
        alone = read(model, ids[row : row + 1, there])
        torch.testing.assert_close(together.context[row], alone.context[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_the_future_does_not_reach_the_past(cell: str) -> None:
    model = make(cell)
    ids = torch.randint(V, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % V
    with torch.no_grad():
        first, second = model(ids).features, model(changed).features
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 8:], second[:, 8:])


def test_token_scope_sees_one_token_only() -> None:
    model = make("layerwise", scope="token")
    ids = torch.randint(V, (1, 12))
    changed = ids.clone()
    changed[0, :7] = (ids[0, :7] + 1) % V
    with torch.no_grad():
        torch.testing.assert_close(model(ids).features[:, 7:], model(changed).features[:, 7:])


def test_blocks_are_solved_one_after_another() -> None:
    model = make("convex", num_blocks=2)
    found = model.search(torch.arange(V), SolverConfig(tolerance=1e-6))
    assert found.contexts.shape == (V, 2, 16)
    for k, cell in enumerate(model.cells()):
        moved = cell(found.contexts[:, k], found.inputs[k])
        torch.testing.assert_close(moved, found.contexts[:, k], atol=1e-4, rtol=0)


def test_known_contexts_replace_the_recurrence() -> None:
    model = make("convex")
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        _, contexts = model.stream_contexts(ids, model.initial_context(2))
        known = model(ids, contexts=torch.stack(contexts, dim=2)).features
        torch.testing.assert_close(known, model(ids).features)


def test_sampling_rules() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        config = SampleConfig(**{"top_k": 0, "top_p": 1.0, "temperature": 5.0, **settings})  # pyright: ignore
        return {int(sample(logits, config, generator)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(temperature=0.0) == {0}
    assert drawn(temperature=1.0, top_p=0.6) == {0}
    assert drawn(temperature=1.0, top_p=0.7) == {0, 1}
    seen = torch.tensor([[True, False, False, False]])
    config = SampleConfig(temperature=0.0, repetition_penalty=3.0)
    assert int(sample(logits, config, generator, seen)) == 1


def test_the_same_seed_draws_the_same_text_and_stops() -> None:
    model = make()
    reading = read(model, torch.tensor([[1, 2, 3]]))
    config = SampleConfig(max_new_tokens=30, seed=5)
    first, second = (list(stream(model, reading, config)) for _ in range(2))
    assert first == second and len(first) == 30
    other = list(stream(model, reading, SampleConfig(max_new_tokens=30, seed=6)))
    assert other != first
    ended: list[Reading] = []
    cut = list(stream(model, reading, config, stop_ids=(first[4],), on_reading=ended.append))
    assert cut == first[: first.index(first[4])]
    expected = read(model, torch.tensor([[1, 2, 3, *cut, first[4]]]))
    torch.testing.assert_close(ended[-1].context, expected.context, atol=1e-5, rtol=0)


def test_evaluation_is_a_plain_loop_over_dialogues() -> None:
    model = make()
    dialogues = [torch.randint(V, (n,)).tolist() for n in (5, 9, 2, 14)]
    store = store_of(dialogues)
    found = evaluate(model, store, batch_size=3, segment_length=4)
    nats, correct, said = [], [], []
    position = 0
    for ids in dialogues:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids])).features)[0, :-1]
        targets = torch.tensor(ids[1:])
        nats += F.cross_entropy(logits, targets, reduction="none").tolist()
        correct += (logits.argmax(dim=-1) == targets).tolist()
        said += [(position + 1 + i) % 2 == 1 for i in range(len(targets))]
        position += len(ids)
    assert found.num_tokens == len(nats) == 26
    assert found.loss == pytest.approx(sum(nats) / 26, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.accuracy == pytest.approx(sum(correct) / 26)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / (30 * 3), abs=1e-5)
    chosen = [n for n, s in zip(nats, said, strict=True) if s]
    assert found.loss_assistant == pytest.approx(sum(chosen) / len(chosen), abs=1e-5)
    part = head(store, 6)
    assert part.num_dialogues == 2 and part.num_tokens == 14


@pytest.mark.slow
def test_memory_and_time_of_generation_stay_flat() -> None:
    import resource

    model = make()
    reading = read(model, torch.tensor([[1]]))
    config = SampleConfig(max_new_tokens=4000, temperature=0.0)
    tokens = stream(model, reading, config)
    for _ in range(500):
        next(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = set()
    for _ in range(3000):
        next(tokens)
        sizes.add(reading.context.numel())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after <= before * 1.05
    assert len(sizes) == 1
