"""Engines inside the model: whatever carries the context, what comes out is the same."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._inductor.config

from helpers import small_model, store_of
from new_llm.cell import BOUND, LARGEST_INITIAL_COUPLING, ConvexCell
from new_llm.config import ModelConfig, Phase1Config, Phase2Config, SolverConfig
from new_llm.console import Console
from new_llm.errors import ConfigError
from new_llm.evaluate import evaluate
from new_llm.generate import read
from new_llm.model import NewLLM
from new_llm.phase2 import Phase2Data, train
from new_llm.recurrence import MAX_SWEEPS, choose
from new_llm.stepper import Stepper

V = 40


def make(cell: str = "convex", **changes: object) -> NewLLM:
    torch.manual_seed(0)
    return NewLLM(small_model(cell, **changes), V, SolverConfig()).eval()


def text(batch: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def test_a_model_says_the_same_by_every_engine() -> None:
    model, ids = make(), text()
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[1, 30] = True
    real = torch.ones_like(starts)
    real[0, 60:] = False
    expected = model(ids, starts=starts, real=real)
    for engine in ("gate-scan", "jacobi"):
        found = model(ids, starts=starts, real=real, engines=[engine] * 2)
        assert [one.engine for one in found.carried] == [engine] * 2
        torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.context, expected.context, atol=1e-5, rtol=0)


def test_an_audit_sees_what_differs() -> None:
    model, ids = make(), text(length=200)
    zero = model.initial_context(2)
    carried = model(ids, zero, engines=["gate-scan"] * 2).carried
    assert model.audit(ids, zero, carried, window=64) < 1e-4
    # whole texts, so that the window holds the place that is wrong
    wrong = [replace(one, contexts=one.contexts.detach().clone()) for one in carried]
    wrong[0].contexts[1, 150] += 0.1
    assert model.audit(ids, zero, wrong, window=200) > 1e-2


def test_auto_says_what_it_chose_and_why() -> None:
    model = make()
    choices = model.choose_engines(text())
    assert len(choices) == 2
    assert all("sweeps of 2 x 70 positions on cpu" in choice.why for choice in choices)
    assert [one.engine for one in model.choose_engines(text(), engine="jacobi")] == ["jacobi"] * 2
    seed = make("layerwise").choose_engines(text())
    assert seed[0].engine == "scan" and "not separate" in seed[0].why


def test_auto_goes_by_what_both_would_cost() -> None:
    cell = ConvexCell(256, 256, 256)
    one = {"device": "cuda", "length": 4096}
    assert choose(cell, batch=1, num_sweeps=7, **one).engine == "gate-scan"
    assert choose(cell, batch=4096, num_sweeps=7, **one).engine == "scan"
    # a cell that does not contract is not worth sweeps
    assert choose(cell, batch=1, num_sweeps=MAX_SWEEPS, **one).engine == "scan"
    assert choose(cell, batch=1, num_sweeps=None, **one).engine == "scan"
    on_cpu = [
        choose(cell, device="cpu", batch=batch, length=2048, num_sweeps=5).engine
        for batch in (1, 64)
    ]
    assert on_cpu == ["gate-scan", "scan"]


@pytest.mark.parametrize("engine", ["gate-scan", "jacobi"])
def test_evaluation_does_not_depend_on_the_engine(engine: str) -> None:
    model = make()
    store = store_of([list(range(30)), [5, 6, 7] * 20, [1, 2]])
    expected = evaluate(model, store, engine="scan")
    found = evaluate(model, store, engine=engine)  # pyright: ignore[reportArgumentType]
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)
    assert found.num_tokens == expected.num_tokens


def test_evaluation_falls_back_where_the_audit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = make(), store_of([list(range(30)), [5, 6, 7] * 20])
    expected = evaluate(model, store, engine="scan")
    monkeypatch.setattr(model, "audit", lambda *given, **named: 1.0)
    assert evaluate(model, store, engine="gate-scan") == expected


def test_phase_2_learns_the_same_by_gate_scan() -> None:
    losses = {}
    for engine in ("scan", "gate-scan"):
        model = make()
        config = Phase2Config(
            max_steps=8, min_steps=0, batch_size=2, evaluations=0, learning_rate=1e-2,
            contractive=0.0, engine=engine,
        )  # fmt: skip
        store = store_of([[i % V for i in range(50)], [(3 * i) % V for i in range(90)]])
        history: list[dict] = []
        train(
            model, Phase2Data(train=store, valid=store, segment_length=32, cache=None), config,
            seed=0, phase1=Phase1Config(), console=Console(quiet=True), log=history.append,
        )  # fmt: skip
        losses[engine] = history[-1]["loss"]
    assert losses["gate-scan"] == pytest.approx(losses["scan"], rel=1e-3)


@pytest.mark.parametrize("tabled", [True, False])
@pytest.mark.parametrize(
    ("cell", "changes"),
    [("convex", {}), ("convex", {"mlp_width": 0, "num_blocks": 3}), ("layerwise", {}),
     ("sequential", {"num_blocks": 2})],
)  # fmt: skip
def test_the_stepper_is_the_model(cell: str, changes: dict[str, object], tabled: bool) -> None:
    model, ids = make(cell, **changes), text(batch=1, length=30)
    for parameter in model.parameters():
        # what starts at zero, as the MLP's last layer, would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    for one in model.cells():
        if isinstance(one, ConvexCell):
            # two numbers are now cut and now not
            one.to_delta.bias.data[:2] = torch.tensor([-BOUND, BOUND])
    model.eval()
    step, context = Stepper(model, tabled=tabled), model.initial_context(1)
    for t in range(30):
        logits = step(int(ids[0, t]), context)
        expected = read(model, ids[:, : t + 1])
        torch.testing.assert_close(logits, expected.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(context, expected.context, atol=1e-5, rtol=0)


@pytest.mark.slow
# PyTorch's compiler uses what PyTorch itself calls deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", ["as it is", "none"])
def test_a_compiled_step_is_the_step_with_or_without_a_compiler(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler == "none":
        torch._dynamo.reset()
        monkeypatch.setenv("CXX", "/no/such/compiler")
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
        monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    model, tokens = make(), [3, 1, 4, 1, 5]
    plain, compiled = Stepper(model), Stepper(model, compiled=True)
    contexts = [model.initial_context(1) for _ in range(2)]
    for token in tokens:
        expected = plain(token, contexts[0])
        torch.testing.assert_close(compiled(token, contexts[1]), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(contexts[1], contexts[0], atol=1e-5, rtol=0)
    if compiler == "none":
        assert not compiled.compiled


def test_the_stepper_needs_a_carried_context() -> None:
    with pytest.raises(ValueError, match="sequence scope"):
        Stepper(make("layerwise", scope="token"))


def test_certified_keeps_q_inf_under_the_limit_in_training() -> None:
    torch.manual_seed(0)
    cell = ConvexCell(24, 16, 20, coupling_limit=0.9, certified=True)
    # coupled as strongly as other cells at the start, not switched off
    assert cell.coupling()["q_inf"] == pytest.approx(LARGEST_INITIAL_COUPLING, rel=1e-5)
    optimiser = torch.optim.Adam(cell.parameters(), lr=3e-2)
    context, x = torch.randn(64, 24), torch.randn(64, 16)
    for _ in range(100):
        loss = -(cell(context, x) - cell(context + 1e-2, x)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert cell.coupling()["q_inf"] <= 0.9 * (1 + 1e-5)
    cell.eval()
    # it pressed against the limit, or nothing was shown
    assert 0.89 <= max(cell.coupling().values()) <= 0.9 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"cell": "layerwise"}, "for the convex cell"), ({"coupling_limit": 1.5}, "below 1")],
)
def test_certified_is_for_a_limit_that_proves(changes: dict, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        ModelConfig(certified=True, **changes)
