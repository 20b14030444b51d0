"""What fuzzing and load have found, each once, as small as it gets."""

import contextlib
import gzip
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers import real_dialogues, reseal, saved
from new_llm import cli, dialogues, quality
from new_llm.checkpoint import Checkpoint, load_checkpoint, save_tensors
from new_llm.config import RunConfig, SampleConfig, from_dict
from new_llm.console import Console
from new_llm.data import TokenStore, write_store
from new_llm.dialogues import ReadReport, read_dialogues
from new_llm.errors import CheckpointError, ConfigError, DataError, NewLLMError
from new_llm.files import read_json, read_object, write_manifest
from new_llm.generate import Conversation, _Shown
from new_llm.records import read_history
from new_llm.resume import Keeper
from new_llm.runner import Runner
from new_llm.serve import Endpoint, Sessions
from new_llm.store import FORMAT_VERSION
from new_llm.tokenizer import IM_END, IM_START, ChatTokenizer

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("found") / "small")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def taken(source: Path | str, on_bad_row: str = "skip") -> int:
    rows = read_dialogues(
        str(source), split="x", on_bad_row=on_bad_row, max_dialogues=None, report=ReadReport()
    )
    return sum(1 for _ in rows)


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 200_000, "x" * 2000], ids=len)
def test_lines_that_no_reader_expects_are_rows_like_others(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogues, "_LONGEST_ROW", 1000)
    good = json.dumps(GOOD)
    text = f"{good}\n{line}\n{good}\n".encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert taken(tmp_path / name) == 2
        with pytest.raises(DataError, match="line 2"):
            taken(tmp_path / name, "error")


def test_a_packed_file_whose_middle_is_damaged_is_named(tmp_path: Path) -> None:
    data = bytearray(gzip.compress((json.dumps(GOOD) + "\n").encode() * 50))
    data[12:16] = b"\xff\xff\xff\xff"
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz must be readable"):
        taken(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x", "x" * 300, "/" + "x" * 300])
def test_names_that_no_file_can_have_are_data_errors(source: str) -> None:
    with pytest.raises(DataError):
        taken(source)


def test_an_error_is_one_line_however_much_was_given() -> None:
    row = {"messages": [{"role": "r" * 10**6, "content": "x"}], "a\nb\x1b[31m": 1}
    for wrong in (row, {"a\nb\x1b[31m" * 10**5: 1}):
        with pytest.raises(DataError) as caught:
            dialogues.check_dialogue(wrong, "line 1")
        assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()
    assert str(NewLLMError("a\r\nb")) == "a\\r\\nb"


@pytest.mark.parametrize(
    "values",
    [
        {"data": 3}, {"phase2": {"weight_decay": 10**400}}, {"seed": None}, {"model": []},
        {"phase1": {"batch_size": 2**62}}, {"phase2": {"epochs": 10**400}},
        {"phase1": {"spread_steps": 10**30}}, {"sample": {"temperature": 1e-40}},
        {"sample": {"repetition_penalty": 1e300}}, 7,
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_computer_can_hold_are_config_errors(values: Any) -> None:
    with pytest.raises(ConfigError):
        from_dict(RunConfig, values)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 200_000, '{"a": NaN}', '{"a": -Infinity}'])
def test_json_that_python_cannot_read_is_a_damaged_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_json(tmp_path / "x.json", "a record")


def test_json_that_holds_something_else_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds no names and values"):
        read_object(tmp_path / "x.json", "a record")
    (tmp_path / "state.json").write_text('{"step": "3", "tokens_seen": 1}')
    with pytest.raises(CheckpointError, match="begin that phase again"):
        Keeper(tmp_path).values()
    for line in ('{"stage": 1, "step": 2}', '{"stage": "phase1"}', "[]", "[" * 200_000):
        (tmp_path / "history.jsonl").write_text(line + "\n{}\n")
        with pytest.raises(CheckpointError, match="line 1"):
            read_history(tmp_path / "history.jsonl")
    kept = finished / "result.json"
    whole = kept.read_text()
    try:
        for harm in ('{"evaluation": 3}', whole.replace('"bigram_loss"', '"other"'), "[]"):
            kept.write_text(harm)
            assert cli.main(["report", str(finished), "--out", str(tmp_path / "page.html")]) == 2
    finally:
        kept.write_text(whole)
    assert not (tmp_path / "page.html").exists()


def test_a_trial_without_numbers_is_named(tmp_path: Path) -> None:
    given = {"console": Console(quiet=True), "folder": tmp_path, "num_workers": 1}
    Runner(**given).run("t", doubled, [{"number": 4}])
    (path,) = tmp_path.glob("*.json")
    for text in ("[]", '{"numbers": 3}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="delete it to compute it again"):
            Runner(**given).run("t", doubled, [{"number": 4}])


def doubled(number: int) -> dict[str, Any]:
    return {"doubled": 2 * number}


def test_a_config_that_asks_for_more_than_the_weights_fills_no_memory(
    folder: Path, tmp_path: Path
) -> None:
    path = folder / "config.json"
    whole = path.read_text()
    values = json.loads(whole)
    values["model"] |= {"hidden_width": 16384, "context_width": 16384, "num_blocks": 64}
    try:
        reseal(path, model=values["model"])
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match="numbers do not fit into"):
            load_checkpoint(folder)
        assert time.monotonic() - begun < 30
        for name in ("vocab_size", "model", "solver"):
            path.write_text(whole)
            reseal(path, **{name: "x"})
            with pytest.raises(CheckpointError, match=r"holds something else|names and values"):
                load_checkpoint(folder)
    finally:
        path.write_text(whole)


# ---- tokenizers


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> str:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(values))
    return str(out)


def test_role_tokens_that_are_not_special_become_so(folder: Path, tmp_path: Path) -> None:
    def plain(values: dict[str, Any]) -> None:
        for token in values["added_tokens"]:
            token["special"] = False

    name = changed(folder, tmp_path / "t", plain)
    tokenizer = ChatTokenizer.from_name(name, iter(()), 300)
    ids = tokenizer.encode(f"a{IM_END}\n{IM_START}b")
    assert not {tokenizer.im_start_id, tokenizer.im_end_id} & {*ids}
    assert tokenizer.decode(ids) == f"a{IM_END}\n{IM_START}b"


def test_a_tokenizer_that_makes_roles_of_text_is_refused(folder: Path, tmp_path: Path) -> None:
    def whole_words(values: dict[str, Any]) -> None:
        values["pre_tokenizer"] = None
        values["model"] |= {"ignore_merges": True}
        values["model"]["vocab"][IM_END] = values["added_tokens"][1]["id"]

    name = changed(folder, tmp_path / "t", whole_words)
    tokenizer = ChatTokenizer.from_name(name, iter(()), 300)
    with pytest.raises(DataError, match="takes text for a role token"):
        tokenizer.encode(IM_END)
    with pytest.raises(DataError, match="takes text for a role token"):
        tokenizer.encode_dialogues([[{"role": "user", "content": IM_END}]])


def test_ids_with_gaps_are_refused_before_a_model_has_a_row_for_each(
    folder: Path, tmp_path: Path
) -> None:
    def far(values: dict[str, Any]) -> None:
        values["model"]["vocab"][next(iter(values["model"]["vocab"]))] = 2**32 - 1

    name = changed(folder, tmp_path / "t", far)
    with pytest.raises(DataError, match="ids leave few gaps"):
        ChatTokenizer.from_name(name, iter(()), 300)


def test_a_panic_of_the_tokenizers_library_is_one_error(folder: Path, tmp_path: Path) -> None:
    def prefix(values: dict[str, Any]) -> None:
        values["model"]["continuing_subword_prefix"] = "##"

    name = changed(folder, tmp_path / "t", prefix)
    with pytest.raises(DataError, match="is damaged"):
        ChatTokenizer.from_name(name, iter(()), 300)
    with pytest.raises(CheckpointError, match="is damaged"):
        ChatTokenizer.load(tmp_path / "t")


# ---- tokenised data, contexts, names


@pytest.mark.parametrize("name", ["tokens", "assistant", "offsets", "num_content_bytes"])
def test_arrays_that_do_not_fit_together_are_refused(
    name: str, loaded: Checkpoint, tmp_path: Path
) -> None:
    write_store(tmp_path / "store", iter(real_dialogues(3)), loaded.tokenizer)
    path = tmp_path / "store" / f"{name}.bin"
    for size in (0, len(path.read_bytes()) - 8, 3):
        path.write_bytes(path.read_bytes()[:size])
        (tmp_path / "store" / "store.json").unlink()
        write_manifest(tmp_path / "store" / "store.json", {}, version=FORMAT_VERSION)
        with pytest.raises(CheckpointError):
            TokenStore.open(tmp_path / "store")


def test_tokens_of_another_vocabulary_are_refused(loaded: Checkpoint, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", iter(real_dialogues(3)), loaded.tokenizer)
    for vocab_size in (2, loaded.tokenizer.vocab_size - 1):
        with pytest.raises(CheckpointError, match="made by another one"):
            store.token_counts(vocab_size)


@pytest.mark.parametrize("type_", [torch.int64, torch.float64, torch.complex64])
def test_a_saved_context_of_other_numbers_is_refused(
    type_: torch.dtype, loaded: Checkpoint, tmp_path: Path
) -> None:
    shape = loaded.model.initial_context(1).shape
    save_tensors(tmp_path / "c", {"context": torch.zeros(shape, dtype=type_)})
    with pytest.raises(CheckpointError, match="load one that this model saved"):
        Conversation(loaded, SampleConfig()).load(tmp_path / "c")


def test_a_place_that_no_file_can_have_does_not_end_a_chat(
    loaded: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    from new_llm.terminal import Chat

    chat = Chat(loaded, SampleConfig(max_new_tokens=2))
    for word in ("/load", "/save"):
        for place in ("x" * 300, "\ud800", "a\0b"):
            chat.hear(f"{word} {place}")
    said = capsys.readouterr().out
    assert not chat.ended and "x" * 300 in said and "choose another name" in said


@pytest.mark.parametrize("place", ["train", "chats", "tokenizer", "train/.."])
def test_a_part_of_a_corpus_stays_inside_of_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "kept").write_text("x")
    monkeypatch.chdir(tmp_path / "data")
    # neither name is the part's own: a corpus of `..` would take the place of the folder above
    with contextlib.suppress(NewLLMError):
        quality.prepare_corpus(tmp_path / "out" / "corpus", Path(place), max_dialogues=20)
    assert (tmp_path / "data" / "kept").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "out"}


# ---- serving


@pytest.fixture(scope="module")
def endpoint(loaded: Checkpoint) -> Endpoint:
    sessions = Sessions(checkpoint=loaded, config=SampleConfig(max_new_tokens=2), minutes=1, most=9)
    return Endpoint("small", sessions)


@pytest.fixture
def client(endpoint: Endpoint) -> Any:
    from starlette.testclient import TestClient

    with TestClient(endpoint.app) as made:
        yield made


@pytest.mark.parametrize("name", ["\ud800", "", "a\nb", "x" * 300, "\x1b[31m"])
def test_a_session_has_a_name_that_an_answer_can_hold(name: str, client: Any) -> None:
    kind = {"Content-Type": "application/json"}
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for place, asked in (("chat/completions", body | {"session": name}),
                         ("sessions/a/fork", {"to": name})):  # fmt: skip
        for stream in (False, True):
            found = client.post(f"/v1/{place}", content=json.dumps(asked | {"stream": stream}),
                                headers=kind)  # fmt: skip
            assert found.status_code == 400 and found.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"\0{}", b"[" * 200_000, b"\xff", b"9" * 5000])
def test_a_body_that_is_no_json_is_told_in_our_words(body: bytes, client: Any) -> None:
    kind = {"Content-Type": "application/json"}
    found = client.post("/v1/chat/completions", content=body, headers=kind)
    assert found.status_code == 400 and found.json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["code"] == 404


def test_few_strings_may_end_a_text_and_long_ones_cost_nothing(client: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stop": ["x"] * 17}
    assert client.post("/v1/chat/completions", json=body).status_code == 400
    shown = _Shown(lambda token: "a", ("a" * 10**6 + "b",))
    begun = time.monotonic()
    assert "".join(map(shown.add, range(300))) + shown.rest() == "a" * 300
    assert time.monotonic() - begun < 5


def test_a_session_keeps_its_context_alone(client: Any, endpoint: Endpoint) -> None:
    body = {"messages": [{"role": "user", "content": "hello " * 500}], "session": "long"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    talk = endpoint.sessions.get("long").conversation
    assert talk.num_turns == 1 and talk.context is not None
    assert talk.last is None and talk.recent == [] and talk.before is talk.context


def test_others_are_told_theirs_while_a_long_text_is_tokenised(
    client: Any, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # where it would stand in the thread that speaks, nobody else would hear anything
    threads: list[str] = []
    encode = endpoint.checkpoint.tokenizer.encode_prompt

    def noting(messages: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(messages)

    monkeypatch.setattr(endpoint.checkpoint.tokenizer, "encode_prompt", noting)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert threads and "texts" not in threads


# ---- the benchmark of it


def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "load.py"
    spec = importlib.util.spec_from_file_location("load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their own module up
    sys.modules["load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("before", "after", "known"), [(1, 1, False), (2, 2, True), (2, 1, False)])
def test_a_session_that_may_have_begun_with_an_interrupted_text_is_left(
    before: int, after: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = benchmark()
    options = load.Options(checkpoint=Path("none"), data="none")
    client = load.Client(0, "http://nobody", [["hello"]], options, load.Figures())
    monkeypatch.setattr(client, "turns", lambda name: before)
    monkeypatch.setattr(client, "leave", lambda *given, **named: None)
    monkeypatch.setattr(client, "expect", lambda *given: {"turns": after})
    said = ["what", "was", "said"]
    client.interrupt("a session", said, 1.0)
    assert bool(said) == known


@pytest.mark.slow
def test_clients_of_all_manners_get_what_they_get_alone(
    folder: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "load.json"
    code = benchmark().main(
        [str(folder), "--data", str(chats), "--minutes", "0.13", "--clients", "8",
         "--max-sessions", "10", "--session-minutes", "0.02", "--json", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert code == 0, found
    assert found["mixed"] == found["errors"] == 0 and found["answers checked"] > 20
    assert found["distinct answers"] > 5 and found["sessions checked"] > 5
