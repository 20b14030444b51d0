import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import small_model, store_of
from new_llm import cache, evaluate, phase1, phase2
from new_llm.cell import LayerwiseCell, SequentialCell
from new_llm.config import PeerConfig, Phase1Config, Phase2Config, SolverConfig
from new_llm.console import Console
from new_llm.data import SegmentStream, held_out_ids
from new_llm.errors import DamagedCacheError, NonFiniteError, StaleCacheError
from new_llm.evaluate import sequence_verdict, token_verdict
from new_llm.measurements import lyapunov_exponent
from new_llm.model import NewLLM
from new_llm.optimiser import Muon
from new_llm.peers import Peer
from new_llm.phase2 import make_optimisers
from new_llm.resume import Keeper

V = 80
QUIET = Console(quiet=True)


def make(cell: str = "convex", **changes: Any) -> NewLLM:
    solver = SolverConfig(metric="mse", tolerance=0.01, max_iterations=50)
    return NewLLM(small_model(cell, **changes), V, solver)


def text(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Return texts in which a token is often followed by the next id."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        ids = [int(generator.integers(V))]
        for _ in range(int(generator.integers(5, 40))):
            jump = 1 if generator.random() < 0.8 else int(generator.integers(V))
            ids.append((ids[-1] + jump) % V)
        texts.append(ids)
    return texts


def test_the_literal_loop_looks_up_its_tokens_where_the_cell_lies() -> None:
    asked = []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids.device.type)
        return torch.zeros(len(ids), 4, device=ids.device)

    cell = LayerwiseCell(6, 4, 8, num_layers=2).to("meta")
    phase1._Literal(cell, embed, [np.array([3, 1, 4, 1])], Phase1Config())
    assert asked == ["meta"]


def test_the_literal_loop_is_the_documents_loop() -> None:
    # double: Adam divides by roots of tiny squares, where float32 shows the order of its sums
    cell = LayerwiseCell(6, 4, 8, num_layers=2, initialisation="torch").double()
    table = torch.randn(10, 4).double()
    config = Phase1Config(epochs=2, max_iterations=4, threshold=1e-3, literal_learning_rate=1e-2)
    twin = LayerwiseCell(6, 4, 8, num_layers=2, initialisation="torch").double()
    twin.load_state_dict(cell.state_dict())
    ids = np.array([3, 1, 4, 1, 5])
    epochs = phase1.train_residual_literal(cell, lambda i: table[i], [ids], config)
    optimiser = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for epoch in epochs:
        total, steps, done = 0.0, 0, 0
        for token in ids:
            context, loss = torch.zeros(6).double(), torch.zeros(())
            for _ in range(4):
                optimiser.zero_grad()
                context_new = twin(context, table[token])
                loss = F.mse_loss(context_new, context.detach())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
                optimiser.step()
                context = context_new.detach()
                steps += 1
                if loss.item() < 1e-3:
                    done += 1
                    break
            total += loss.item()
        assert epoch.mean_loss == pytest.approx(total / 5, rel=1e-9)
        assert epoch.mean_iterations == steps / 5
        assert epoch.convergence_rate == done / 5
    for ours, theirs in zip(cell.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("objective", ["residual", "repetition", "contractive"])
def test_every_objective_changes_the_cell_only(objective: str) -> None:
    model = make("layerwise")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows: list[dict[str, Any]] = []
    config = Phase1Config(
        objective=objective,  # pyright: ignore
        max_steps=5,
        batch_size=8,
        literal_dialogues=1 if objective == "residual" else 0,
        epochs=1,
    )
    phase1.train(
        model, torch.arange(40), [np.arange(3)], config, seed=0, console=QUIET, log=rows.append
    )
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and all(name.startswith("blocks.0.cell.") for name in changed)
    assert rows and all(np.isfinite(row["loss"]) for row in rows)


def test_residual_collapses_and_contractive_spreads() -> None:
    """The documents' own measure is met by a model that answers zero; ours is not."""
    verdicts = {}
    for objective, steps in (("residual", 600), ("contractive", 150)):
        torch.manual_seed(0)
        model = make("convex", num_blocks=1, context_width=32, embedding_width=32)
        config = Phase1Config(
            objective=objective,  # pyright: ignore
            max_steps=steps,
            batch_size=64,
            epochs=1000,
            threshold=1e-9,
            max_iterations=3,
            learning_rate=3e-3,
        )
        phase1.train(
            model, torch.arange(40), [], config, seed=0, console=QUIET, log=lambda row: None
        )
        found = phase1.measure_convergence(model, torch.arange(40, V))
        assert found.summary()["convergence_rate"] == 1.0
        verdicts[objective] = token_verdict(model, torch.arange(40, V)).verdict
    assert verdicts == {"residual": "zero_collapse", "contractive": "healthy"}


def test_repetition_makes_a_phrase_repeat() -> None:
    model = make("layerwise", initialisation="torch")
    rows: list[dict[str, Any]] = []
    config = Phase1Config(
        objective="repetition", max_steps=40, batch_size=8, cycle_length=3, num_cycles=4
    )
    phase1.train(model, torch.arange(40), [], config, seed=0, console=QUIET, log=rows.append)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_a_learning_rate_that_breaks_stops_the_run() -> None:
    model = make("layerwise")
    config = Phase1Config(objective="residual", learning_rate=1e30, batch_size=8, threshold=1e-30)
    with pytest.raises(NonFiniteError, match="step"):
        phase1.train(
            model, torch.arange(40), [], config, seed=0, console=QUIET, log=lambda row: None
        )


def test_convergence_is_weighted_by_positions() -> None:
    found = phase1.Convergence(
        ids=torch.tensor([2, 5]),
        converged=torch.tensor([True, False]),
        num_iterations=torch.tensor([3, 50]),
        change=torch.tensor([0.0, 1.0]),
        curve=torch.zeros(1, 3),
    )
    assert found.summary()["convergence_rate"] == 0.5
    assert found.of_dialogue(np.array([2, 2, 2, 5]))["convergence_rate"] == 0.75
    assert found.of_dialogue(np.array([2, 2, 2, 5]))["mean_iterations_converged"] == 3.0


@pytest.mark.parametrize("count", range(1, 60))
def test_all_converged_is_a_rate_of_exactly_one(count: int) -> None:
    found = phase1.Convergence(
        ids=torch.arange(count),
        converged=torch.ones(count, dtype=torch.bool),
        num_iterations=torch.full((count,), 2),
        change=torch.zeros(count),
        curve=torch.zeros(1, 3),
    )
    assert found.summary()["convergence_rate"] == 1.0
    assert found.summary()["mean_iterations"] == 2.0


def test_variance_terms_forbid_a_constant() -> None:
    constant = torch.full((64, 8), 0.7)
    spread = torch.randn(4096, 8)
    assert phase1.spread_terms(constant, 1.0)[0] > 1.0
    assert phase1.spread_terms(spread, 1.0)[0] < 0.05
    assert phase1.spread_terms(spread, 1.0)[1] < 0.05
    alike = torch.randn(4096, 1).expand(-1, 8)
    assert phase1.spread_terms(alike, 1.0)[1] > 5.0


def train(
    model: NewLLM, folder: Path, config: Phase2Config, *, stop_at: int | None = None, **data: Any
) -> tuple[list[dict[str, Any]], phase2.Phase2Result | None]:
    rows: list[dict[str, Any]] = []

    def log(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["stage"] == "phase2" and row["step"] == stop_at:
            import signal

            signal.raise_signal(signal.SIGINT)

    given: dict[str, Any] = {
        "train": store_of(text()),
        "valid": store_of(text(4, seed=1)),
        "segment_length": 8,
        "cache": None,
    }
    torch.manual_seed(1)
    try:
        result = phase2.train(
            model,
            phase2.Phase2Data(**(given | data)),
            config,
            seed=0,
            phase1=Phase1Config(contraction_target=0.7),
            keeper=Keeper(folder),
            console=QUIET,
            log=log,
        )
    except KeyboardInterrupt:
        return rows, None
    return rows, result


SMALL = Phase2Config(epochs=30, max_steps=60, batch_size=4, evaluations=2, loss_chunk=7)


@pytest.mark.parametrize("cell", ["convex", "layerwise"])
def test_training_lowers_the_held_out_loss(cell: str, tmp_path: Path) -> None:
    rows, result = train(make(cell), tmp_path / "t", replace(SMALL, learning_rate=1e-2))
    held_out = [row["loss"] for row in rows if row["stage"] == "validation"]
    assert held_out[-1] < np.log(V) - 0.3
    assert result is not None and result.num_steps == 60


@pytest.mark.parametrize("cell", ["convex", "layerwise"])
def test_bfloat16_is_for_large_products_only(cell: str, tmp_path: Path) -> None:
    """Contexts stay float32, and the loss stays near that of float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = make(cell)
        rows, _ = train(model, tmp_path / precision, replace(SMALL, precision=precision))
        losses[precision] = [row["loss"] for row in rows if row["stage"] == "validation"][-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            context = model(torch.zeros(2, 5, dtype=torch.long)).context
        assert context.dtype == torch.float32
    assert losses["float32"] != losses["bfloat16"]
    assert abs(losses["float32"] - losses["bfloat16"]) < 0.1


@pytest.mark.parametrize("cell", ["convex", "layerwise"])
def test_gradients_in_bfloat16_point_where_those_in_float32_do(cell: str) -> None:
    model = make(cell)
    gradients, losses = {}, {}
    for precision in ("float32", "bfloat16"):
        objective = phase2._Objective(model, replace(SMALL, precision=precision), None)  # pyright: ignore
        # enough tokens that the rounding of single ones does not count
        stream = SegmentStream(store_of(text(48)), batch_size=16, segment_length=8, seed=0)
        segment = stream.segment(0, 0)
        wanted = torch.tensor(float(segment.counts.sum()))
        model.zero_grad()
        loss = objective(segment, model.initial_context(16), 0, wanted)[0]
        loss.backward()
        losses[precision] = loss.item()
        gradients[precision] = {n: p.grad.clone() for n, p in model.named_parameters()
                                if p.grad is not None}  # fmt: skip
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["bfloat16"] != losses["float32"]
    for name, exact in gradients["float32"].items():
        rough = gradients["bfloat16"][name]
        if exact.norm() > 1e-6:
            assert torch.cosine_similarity(rough.flatten(), exact.flatten(), 0) > 0.98, name


@pytest.mark.parametrize("kind", ["convex", "mamba", "lstm"])
@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_every_weight_is_moved_by_one_optimiser(kind: str, optimiser: str) -> None:
    shape: Any = {"embedding_width": 16, "mlp_width": 8}
    model = make() if kind == "convex" else Peer(PeerConfig(kind=kind, width=16, **shape), 40)  # pyright: ignore
    optimisers = make_optimisers(model, Phase2Config(optimiser=optimiser))  # pyright: ignore
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved: dict[str, tuple[type, float]] = {}
    for one in optimisers:
        for group in one.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in moved
                moved[names[id(parameter)]] = type(one), group["weight_decay"]
    assert set(moved) == set(names.values())
    decays = Phase2Config().weight_decay
    for name, parameter in model.named_parameters():
        is_map = parameter.ndim == 2 and "embedding" not in name and "A_log" not in name
        wanted = Muon if is_map and optimiser == "muon" else torch.optim.AdamW
        assert moved[name][0] is wanted, name
        is_matrix = parameter.ndim >= 2 and "embedding" not in name and "A_log" not in name
        assert moved[name][1] == (decays if is_matrix else 0.0), name


# behind the last step all that is left is to enter evaluation
@pytest.mark.parametrize("stop_at", [30, 60])
@pytest.mark.parametrize("cell", ["layerwise", "convex"])
def test_an_interrupted_training_ends_with_the_same_bits(
    cell: str, stop_at: int, tmp_path: Path
) -> None:
    config = replace(SMALL, pair_hinge=0.5, contractive=0.5)
    torch.manual_seed(3)
    dropout = 0.0 if cell == "convex" else 0.1
    whole, broken, resumed = (make(cell, dropout=dropout).eval() for _ in range(3))
    broken.load_state_dict(whole.state_dict())
    _, result = train(whole, tmp_path / "whole", config)
    _, stopped = train(broken, tmp_path / "broken", config, stop_at=stop_at)
    assert stopped is None
    rows, again = train(resumed, tmp_path / "broken", config)
    assert all(row["step"] > stop_at for row in rows)
    assert result == again
    whole.eval()
    resumed.eval()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_is_kept_of_phase1_keeps_tokens_settled_and_apart(tmp_path: Path) -> None:
    """Judged on ids that the kept objective never draws."""
    lost = []
    for weight in (0.0, 1.0):
        torch.manual_seed(3)
        model = make("layerwise")
        train(model, tmp_path / f"{weight}", replace(SMALL, contractive=weight, learning_rate=1e-2))
        x = model.search(torch.from_numpy(held_out_ids(V, 16))).inputs[0]
        draws = torch.Generator().manual_seed(0)
        lost.append(phase1.contractive_loss(model.cells()[0], x, Phase1Config(), draws)[0].item())
    assert lost[1] < 0.6 * lost[0], lost


def test_assistant_loss_trains_on_assistant_tokens_only(tmp_path: Path) -> None:
    texts = text()
    store = store_of(texts)
    rows, _ = train(
        make(), tmp_path / "t", replace(SMALL, loss_on="assistant", learning_rate=1e-2), train=store
    )
    last = [row for row in rows if row["stage"] == "phase2"][-1]
    assert "loss_assistant" in last and last["loss"] != last["loss_assistant"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"min_steps": 40, "max_steps": None}, 40),
        ({"min_steps": 40, "max_steps": 3}, 3),
        ({"min_steps": 0, "max_steps": None}, None),
    ],
)
def test_a_small_corpus_is_read_again(
    settings: dict[str, Any], steps: int | None, tmp_path: Path
) -> None:
    config = replace(SMALL, epochs=1, evaluations=0, **settings)
    store = store_of(text())
    _, result = train(make(), tmp_path / "t", config, train=store)
    assert result is not None
    if steps is None:
        assert result.num_steps < 40
        # one pass predicts every token but the first of each dialogue
        assert result.tokens_seen == store.num_tokens - store.num_dialogues
    else:
        assert result.num_steps == steps


def test_a_diverging_training_stops_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step"):
        train(make(), tmp_path / "t", replace(SMALL, learning_rate=1e30, gradient_clip=1e30))


def advance(amount: float = 1, note: str = "") -> None:
    """Show nothing."""


def test_token_scope_trains_on_cached_rows(tmp_path: Path) -> None:
    model = make("layerwise", scope="token")
    rows = cache.write_token_cache(tmp_path / "cache", model, advance)
    assert rows.contexts.shape == (V, 1, 16)
    expected = model.search(torch.arange(V)).contexts.numpy()
    assert np.array_equal(rows.contexts, expected)
    before = model.cells()[0].state_dict()["gates.0.weight"].clone()
    # in one pass nothing was rebuilt before the end
    once = replace(SMALL, epochs=1, min_steps=0)
    _, result = train(model, tmp_path / "t", once, cache=rows)
    assert result is not None and result.drift is not None and result.drift > 0
    assert not torch.equal(before, model.cells()[0].state_dict()["gates.0.weight"])


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_frozen_contexts_stay_what_they_are(scope: str, tmp_path: Path) -> None:
    cell = "layerwise" if scope == "token" else "convex"
    model = make(cell, scope=scope, tied_readout=False)
    store = store_of(text())
    if scope == "token":
        rows = cache.write_token_cache(tmp_path / "cache", model, advance)
    else:
        rows = cache.write_sequence_cache(tmp_path / "cache", model, store, advance)
    ids = torch.tensor([text()[2]])

    def contexts() -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            if scope == "token":
                return model.search_distinct(ids)
            return torch.stack(model.stream_contexts(ids, model.initial_context(1))[1], dim=2)

    before = contexts()
    if scope == "sequence":
        start = int(store.offsets[2])
        cached = torch.from_numpy(np.array(rows.contexts[start : start + ids.shape[1]]))
        torch.testing.assert_close(cached, before[0], atol=1e-5, rtol=0)
    config = replace(SMALL, freeze_context=True, learning_rate=1e-2)
    history, _ = train(model, tmp_path / "t", config, cache=rows, train=store)
    losses = [row["loss"] for row in history if row["stage"] == "phase2"]
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(contexts(), before, atol=0, rtol=0)


@pytest.mark.parametrize("lengths", [[5], [2, 90, 3, 4, 7], [30, 31, 2, 33, 29, 3, 40, 3, 50, 21]])
def test_every_row_of_a_cache_is_that_of_its_dialogue_alone(
    lengths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LANE_TOKENS", 48)
    torch.manual_seed(0)
    model, draw = make("convex"), np.random.default_rng(0)
    dialogues = [draw.integers(0, V, length).tolist() for length in lengths]
    store = store_of(dialogues)
    told: list[float] = []

    def told_of(amount: float = 1, note: str = "") -> None:
        told.append(amount)

    rows = cache.write_sequence_cache(tmp_path / "cache", model, store, told_of).contexts
    alone = [
        torch.stack(model.stream_contexts(torch.tensor([ids]), model.initial_context(1))[1], dim=2)
        for ids in dialogues
    ]
    expected = torch.cat(alone, dim=1)[0].detach()
    torch.testing.assert_close(torch.from_numpy(np.asarray(rows)), expected, atol=1e-5, rtol=0)
    assert sum(told) == sum(lengths)


def test_gpt2_cache_is_about_51_megabytes() -> None:
    model = NewLLM(small_model("layerwise", context_width=256), 1000)
    assert cache.cache_bytes(model, 50_259) == pytest.approx(51e6, rel=0.02)


def test_stale_and_damaged_caches_are_refused_by_name(tmp_path: Path) -> None:
    model, other = make(), make()
    folder = tmp_path / "cache"
    cache.write_token_cache(folder, model, advance)
    assert cache.open_cache(folder, cache.token_key(model)).contexts.shape == (V, 2, 16)
    with pytest.raises(StaleCacheError, match=cache.token_key(other)):
        cache.open_cache(folder, cache.token_key(other))
    model.solver = SolverConfig(tolerance=1e-3)
    with pytest.raises(StaleCacheError):
        cache.open_cache(folder, cache.token_key(model))
    path = folder / "contexts-00001-of-00001.f32"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    key = json.loads((folder / "cache.json").read_text())["key"]
    with pytest.raises(DamagedCacheError, match="checksum"):
        cache.open_cache(folder, key)
    path.write_bytes(data[:-4])
    with pytest.raises(DamagedCacheError, match="bytes"):
        cache.open_cache(folder, key)
    (folder / "cache.json").write_text("{")
    with pytest.raises(DamagedCacheError):
        cache.open_cache(folder, key)


def test_shards_are_one_cache_and_one_in_anothers_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, store, folder = make(), store_of(text()), tmp_path / "cache"
    whole = cache.write_sequence_cache(tmp_path / "whole", model, store, advance).contexts
    monkeypatch.setattr(cache, "SHARD_BYTES", len(whole) * 4 * 2 * 16 // 3)
    rows = cache.write_sequence_cache(folder, model, store, advance).contexts
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["cache.json", *(f"contexts-0000{n}-of-00003.f32" for n in (1, 2, 3))]
    torch.testing.assert_close(np.asarray(rows), np.asarray(whole), atol=1e-6, rtol=0)
    drawn = np.random.default_rng(0).integers(0, len(whole), 50)
    assert np.array_equal(rows[drawn], np.asarray(rows)[drawn])
    # shards begin where dialogues do
    assert all(len(rows.shards[k]) in np.diff(store.offsets).cumsum() for k in (0,))
    first, second = (folder / name for name in names[1:3])
    size = min(len(rows.shards[0]), len(rows.shards[1])) * 4 * 2 * 16
    key = cache.sequence_key(model, store)
    first.write_bytes(second.read_bytes()[:size].ljust(first.stat().st_size, b"\0"))
    with pytest.raises(DamagedCacheError, match="contexts-00001"):
        cache.open_cache(folder, key)


def test_an_interrupted_cache_keeps_its_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, store, folder = make(), store_of(text()), tmp_path / "cache"
    monkeypatch.setattr(cache, "SHARD_BYTES", store.num_tokens * 4 * 2 * 16 // 3)
    whole = cache.write_sequence_cache(tmp_path / "w", model, store, advance).contexts
    calls = []

    def stop(amount: float = 1, note: str = "") -> None:
        calls.append(amount)
        # the first call says what is there already
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write_sequence_cache(folder, model, store, stop)
    assert not folder.exists()
    shards = tmp_path / ".cache.shards"
    kept = shards / "contexts-00001-of-00003.f32"
    written = kept.stat().st_mtime_ns
    # a shard of another cache is none of this
    other = shards / "contexts-00002-of-00003.f32"
    other.write_bytes(b"x" * 100)
    rows = cache.write_sequence_cache(folder, model, store, advance).contexts
    assert (folder / kept.name).stat().st_mtime_ns == written
    assert np.array_equal(np.asarray(rows), np.asarray(whole))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "w"}


def test_a_model_that_ignores_its_context_is_amnesic() -> None:
    torch.manual_seed(0)
    model = make("convex", num_blocks=1, context_width=32, embedding_width=32)
    with torch.no_grad():
        model.read_outs()[0][1].weight.zero_()  # pyright: ignore
    diagnosis = sequence_verdict(model, store_of(text(20)), trained=True)
    # what the sweeps reached is the scan's, to about what they still moved by
    reached = {name: row.value for name, row in diagnosis.measurements.items()
               if name.endswith("sweep_distance")}  # fmt: skip
    assert reached and all(0.0 < float(value or 0.0) < 1e-3 for value in reached.values())
    assert "amnesic" in diagnosis.verdicts
    assert "amnesic" not in sequence_verdict(model, store_of(text(20)), trained=False).verdicts


def test_a_model_of_nan_is_judged_too() -> None:
    model = make("convex").train()
    with torch.no_grad():
        model.cells()[-1].to_delta.weight[0, 0] = torch.nan  # pyright: ignore
    assert token_verdict(model).verdict == "non_finite"
    assert sequence_verdict(model, store_of(text(20)), trained=True).verdict == "non_finite"
    assert model.training


def test_small_differences_are_carried_along_contexts_that_the_model_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, store, bases = make("convex").eval(), store_of(text(20)), []

    def watched(step: Any, initial: torch.Tensor, counted: torch.Tensor) -> Any:
        rows: list[torch.Tensor] = []

        def seen(context: torch.Tensor, t: int) -> torch.Tensor:
            updated = step(context, t)
            rows.append(updated[: len(initial)])
            return updated

        found = lyapunov_exponent(seen, initial, counted)
        bases.append(torch.stack(rows, dim=1))
        return found

    monkeypatch.setattr(evaluate, "lyapunov_exponent", watched)
    sequence_verdict(model, store, trained=True)
    ids, starts, real = evaluate._diagnosed_text(store, torch.device("cpu"))
    assert starts[:, 1:].any()
    zero = model.initial_context(len(ids))
    _, contexts = model.stream_contexts(ids, zero, starts=starts, real=real)
    for base, expected in zip(bases, contexts, strict=True):
        torch.testing.assert_close(base[real], expected[real])


@pytest.mark.parametrize(("width", "counts"), [(256, False), (384, True)])
def test_the_worst_pairs_count_apart_in_wide_cells(width: int, counts: bool) -> None:
    torch.manual_seed(0)
    cell = SequentialCell(width, width, width, num_layers=1, initialisation="orthogonal")
    x, config = torch.randn(32, width), Phase1Config(contraction_target=0.1)

    def loss(progress: float) -> float:
        generator = torch.Generator().manual_seed(1)
        return phase1.contractive_loss(cell, x, config, generator, progress=progress)[0].item()

    begun, half, done = loss(0.0), loss(0.5), loss(1.0)
    assert (begun < half < done) if counts else begun == half == done
    # linear in progress
    assert done - half == pytest.approx(half - begun, rel=1e-3)
