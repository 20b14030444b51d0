"""Serving: clients of OpenAI's chat API, as they are, against the command as a user runs it."""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers import real_dialogues, saved, served
from new_llm import cli
from new_llm.checkpoint import load_checkpoint
from new_llm.config import SampleConfig
from new_llm.generate import Conversation, generate
from new_llm.serve import Endpoint, Sessions, Turns, _Refused, _Told

FIRST = [message["content"] for messages in real_dialogues(16) for message in messages[:1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("serve") / "small")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served("serve", str(folder), "--port", "0") as place:
        yield f"{place}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def alone(folder: Path, texts: list[str], **config: Any) -> list[str]:
    """Return what a conversation of our own answers."""
    talk = Conversation(load_checkpoint(folder), SampleConfig(**config))
    drawn = SampleConfig(**config)
    return [
        "".join(talk.answer([{"role": "user", "content": text}], config=drawn)) for text in texts
    ]


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_client_chats(client: openai.OpenAI, folder: Path) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    answer = client.chat.completions.create(
        model="small", messages=asked("hello"), max_tokens=12, temperature=0, seed=5
    )
    (choice,) = answer.choices
    expected = alone(folder, ["hello"], max_new_tokens=12, temperature=0.0)
    assert choice.message.role == "assistant" and [choice.message.content] == expected
    assert choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    # parts of text are text
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    again = client.chat.completions.create(
        model="small", messages=parts, max_completion_tokens=12, temperature=0
    )
    assert again.choices[0].message.content == choice.message.content


def test_an_answer_is_streamed(client: openai.OpenAI, folder: Path) -> None:
    pieces = list(
        client.chat.completions.create(
            model="small", messages=asked("hello"), max_tokens=30, seed=7, temperature=1.0,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    told = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    expected = alone(folder, ["hello"], max_new_tokens=30, temperature=1.0, seed=7)
    assert ["".join(told)] == expected and sum(map(bool, told)) > 5
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 30


def test_a_prompt_is_continued_up_to_a_stop_string(client: openai.OpenAI, folder: Path) -> None:
    whole = client.completions.create(model="small", prompt="hello", max_tokens=30, seed=3)
    expected = generate(load_checkpoint(folder), "hello", SampleConfig(max_new_tokens=30, seed=3))
    text = whole.choices[0].text
    assert text == expected
    cut = client.completions.create(
        model="small", prompt="hello", max_tokens=30, seed=3, stop=[text[6:9]]
    )
    assert cut.choices[0].text == text[: text.index(text[6:9])]
    assert cut.choices[0].finish_reason == "stop"
    pieces = client.completions.create(
        model="small", prompt="hello", max_tokens=30, seed=3, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == text


def test_sixteen_clients_at_once_get_what_they_get_alone(
    client: openai.OpenAI, folder: Path
) -> None:
    def answer(number: int) -> str:
        options: Any = {"max_tokens": 40, "temperature": 1.0, "seed": number}
        made = client.chat.completions.create(
            model="small", messages=asked(FIRST[number]), **options
        )
        return made.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answer, range(16)))
    for number, found in enumerate(together):
        expected = alone(folder, [FIRST[number]], max_new_tokens=40, temperature=1.0, seed=number)
        assert [found] == expected


def test_a_session_reads_what_is_new_to_it(client: openai.OpenAI, folder: Path, url: str) -> None:
    drawn: Any = {"model": "small", "max_tokens": 8, "temperature": 0}

    def say(text: str, session: str) -> str:
        made = client.chat.completions.create(
            messages=asked(text), extra_body={"session": session}, **drawn
        )
        assert made.to_dict()["session"] == session
        assert made.usage is not None and made.usage.prompt_tokens < 60
        return made.choices[0].message.content or ""

    texts = FIRST[:3]
    found = [say(text, "a") for text in texts]
    assert found == alone(folder, texts, max_new_tokens=8, temperature=0.0)
    # a fork goes on from there, and leaves it alone
    forked = httpx.post(f"{url}/sessions/a/fork", json={"to": "b"}).json()
    assert forked["turns"] == 3 and 1700 < forked["seconds_left"] <= 1800
    more = say(FIRST[3], "b")
    assert more == say(FIRST[3], "a")
    assert more == alone(folder, FIRST[:4], max_new_tokens=8, temperature=0.0)[-1]
    assert httpx.post(f"{url}/sessions/a/fork", json={"to": "b"}).status_code == 409
    assert httpx.delete(f"{url}/sessions/a").json()["deleted"]
    assert httpx.get(f"{url}/sessions/a").status_code == 404
    assert httpx.get(f"{url}/sessions/b").json()["turns"] == 4


def test_a_stream_that_is_left_changes_no_session(client: openai.OpenAI, url: str) -> None:
    drawn: Any = {"model": "small", "seed": 1, "extra_body": {"session": "left"}}
    client.chat.completions.create(messages=asked("hello"), max_tokens=3, **drawn)
    told = client.chat.completions.create(
        messages=asked("and then?"), max_tokens=500_000, stream=True, **drawn
    )
    next(iter(told))
    with pytest.raises(openai.ConflictError, match="is speaking"):
        client.chat.completions.create(messages=asked("hello"), **drawn)
    forked = httpx.post(f"{url}/sessions/left/fork", json={"to": "other"})
    assert forked.status_code == 409 and "is speaking" in forked.text
    told.close()
    health = {}
    for _ in range(100):
        health = httpx.get(url.replace("/v1", "/health")).json()
        if not health["texts"]:
            break
        time.sleep(0.1)
    assert health["texts"] == 0 and health["status"] == "ok"
    assert httpx.get(f"{url}/sessions/left").json()["turns"] == 1
    client.chat.completions.create(messages=asked("hello"), max_tokens=3, **drawn)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_at_once_leaves_nothing_speaking(
    stream: bool, folder: Path
) -> None:
    sessions = Sessions(
        checkpoint=load_checkpoint(folder), config=SampleConfig(max_new_tokens=10**6), minutes=1.0,
        most=9,
    )  # fmt: skip
    endpoint = Endpoint("small", sessions)
    body = json.dumps({"messages": asked("hi"), "session": "a", "stream": stream}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions",
             "headers": [(b"content-type", b"application/json")],
             "query_string": b"", "http_version": "1.1", "scheme": "http", "raw_path": b"",
             "client": ("a", 1), "server": ("b", 2), "root_path": "",
             "asgi": {"version": "3.0", "spec_version": "2.0"}}  # fmt: skip

    async def leave() -> None:
        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return coming.pop() if coming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        async with endpoint._living(endpoint.app):
            with contextlib.suppress(Exception):
                await endpoint.app(scope, receive, send)
            assert endpoint.turns is not None
            for _ in range(200):
                if not len(endpoint.turns):
                    break
                await asyncio.sleep(0.05)
            assert len(endpoint.turns) == 0

    # a browser of other tests may have a loop of its own in this thread
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(leave())).result()
    assert not sessions.get("a").speaking and sessions.get("a").conversation.num_turns == 0


BAD = {
    "another model": ({"model": "gpt"}, 404, "the model 'small' is served here, got 'gpt'"),
    "no messages": ({"messages": []}, 400, "a message with some text expected"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "of type text",
    ),
    "a temperature": ({"temperature": -1}, 400, "temperature must be at least 0"),
    "a number": ({"max_tokens": "many"}, 400, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, 400, "max_new_tokens must be"),
    "two answers": ({"n": 2}, 400, "n is not supported here, got 2"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is not supported here"),
    "bad text": ({"messages": asked("\ud800")}, 400, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_answered_in_one_error(kind: str, stream: bool, url: str) -> None:
    changes, status, says = BAD[kind]
    body = {"model": "small", "messages": asked("hi"), "max_tokens": 2, "stream": stream}
    text = json.dumps(body | changes)
    found = httpx.post(f"{url}/chat/completions", content=text,
                       headers={"Content-Type": "application/json"})  # fmt: skip
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert says in error["message"]
    # which field is meant, where it is one
    assert kind != "a temperature" or error["param"] == "temperature"
    assert kind != "no tokens" or error["param"] is None


def test_a_body_that_is_no_json_is_said_to_be_none(url: str) -> None:
    found = httpx.post(f"{url}/chat/completions", content=b'{"model": "small", oops',
                       headers={"Content-Type": "application/json"})  # fmt: skip
    assert found.status_code == 400
    error = found.json()["error"]
    assert "a body in JSON expected" in error["message"] and error["param"] is None


def test_what_no_talk_needs_is_not_read(url: str) -> None:
    found = httpx.post(f"{url}/chat/completions", content=b" " * (16 * 2**20 + 1))
    assert found.status_code == 413 and "at most 16,777,216 bytes" in found.text

    def endless() -> Iterator[bytes]:
        yield b"{"

    assert httpx.post(f"{url}/chat/completions", content=endless()).status_code == 413


def test_neutral_values_of_other_fields_are_taken(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="small", messages=asked("hi"), max_tokens=2, n=1, frequency_penalty=0, user="me",
        presence_penalty=0, logit_bias={}, logprobs=False, response_format={"type": "text"},
    )  # fmt: skip


def test_sessions_are_forgotten_when_they_are_old_or_too_many(folder: Path) -> None:
    now = [0.0]
    sessions = Sessions(
        checkpoint=load_checkpoint(folder), config=SampleConfig(), minutes=1.0, most=2,
        clock=lambda: now[0],
    )  # fmt: skip
    first = sessions.begin("a")
    now[0] = 100.0  # it speaks: time does not pass for it
    assert len(sessions) == 1
    with pytest.raises(_Refused, match="is speaking"):
        sessions.begin("a")
    sessions.end("a", first)
    sessions.end("b", sessions.begin("b"))
    now[0] = 130.0
    sessions.end("a", sessions.begin("a"))
    sessions.begin("c")
    # b was used longest ago
    with pytest.raises(_Refused, match="never used"):
        sessions.get("b")
    assert sessions.get("a").conversation is first
    now[0] = 191.0
    assert len(sessions) == 1
    sessions.begin("d")
    with pytest.raises(_Refused, match="all sessions are in use"):
        sessions.begin("e")


def test_texts_are_told_in_turns() -> None:
    order: list[str] = []
    done: list[Any] = []

    def slow(name: str) -> Iterator[str]:
        for number in range(3):
            order.append(name + str(number))
            time.sleep(0.02)
            yield name

    turns = Turns()
    for name in "ab":
        turns.add(lambda name=name: slow(name), done.append)
    turns.add(lambda: iter([1 / 0]), done.append)  # pyright: ignore
    while done.count(None) < 2:
        time.sleep(0.01)
    turns.close()
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert sum(isinstance(piece, ZeroDivisionError) for piece in done) == 1


def test_a_text_is_over_when_the_thread_is_done_with_it_and_not_before() -> None:
    """Left while its last piece is drawn, it still counts, and is at work until then."""
    happened: list[Any] = []
    at_work, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "a"
        at_work.set()
        assert go_on.wait(10)
        happened.append("counted")

    def over() -> None:
        happened.append("over")

    turns = Turns()
    left = turns.add(slow, happened.append, over)
    assert at_work.wait(10)
    left.cancelled = True
    time.sleep(0.05)
    assert happened == ["a"]
    # the other ends: by an error, and before it began
    turns.add(lambda: iter(str(1 // 0)), lambda _: None, over)
    turns.add(lambda: iter("never"), happened.append, over).cancelled = True
    go_on.set()
    for _ in range(500):
        if happened.count("over") == 3:
            break
        time.sleep(0.01)
    turns.close()
    assert happened.count("over") == 3
    assert happened[:4] == ["a", "counted", "over", None] and "n" not in happened


def test_a_session_speaks_until_the_piece_at_work_is_done(folder: Path) -> None:
    sessions = Sessions(
        checkpoint=load_checkpoint(folder), config=SampleConfig(max_new_tokens=10**6), minutes=1.0,
        most=9,
    )  # fmt: skip
    endpoint = Endpoint("small", sessions)
    at_work, go_on = threading.Event(), threading.Event()

    def told() -> Iterator[str]:
        yield "a"
        at_work.set()
        assert go_on.wait(10)

    async def leave() -> None:
        async with endpoint._living(endpoint.app):
            talk = sessions.begin("a")
            text = _Told(endpoint, told, lambda: None, lambda: sessions.end("a", talk))
            await asyncio.to_thread(at_work.wait, 10)
            text.stop()
            await asyncio.sleep(0.1)
            with pytest.raises(_Refused, match="is speaking"):
                sessions.fork("a", "b")
            go_on.set()
            assert await text._next() == "a" and await text._next() is None
            sessions.fork("a", "b")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(leave())).result()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("serve", "uvicorn", "serve"), ("ui", "gradio", "ui"), ("export", "onnxruntime", "onnx")],
)
def test_a_missing_extra_is_said_in_one_line(
    command: str, package: str, extra: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"new_llm.{command}", raising=False)
    out = ["--out", str(tmp_path / "x")] if command == "export" else []
    assert cli.main([command, str(folder), *out]) == 2
    assert f'{package} expected, it is not installed; pip install "new-llm[{extra}]"' in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "x").exists()


def test_an_address_that_is_taken_is_said_in_one_line(
    folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = url.rpartition(":")[2].partition("/")[0]
    assert cli.main(["serve", str(folder), "--port", port]) == 2
    assert f"127.0.0.1 port {port} cannot be used" in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--port", "99999"]) == 2
    assert cli.main(["serve", str(folder), "--max-sessions", "0"]) == 2
