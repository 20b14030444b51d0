"""Serving under load: many clients, of all manners, against the command as a user runs it.

    python benchmarks/load.py runs/demo --data valid.jsonl --minutes 10 --clients 16

Clients talk in sessions (streamed or not, forked, forgotten, interrupted), ask without one, and ask
what is wrong. Afterwards every answer is compared, letter by letter, with what the same talk gives
alone in this process: one that is not equal had the context of somebody else. Exit code 1 if any
answer is, if any status is not what it should be, if a stream breaks, or if memory grows.
"""

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro

from new_llm.checkpoint import Checkpoint, load_checkpoint
from new_llm.config import SampleConfig
from new_llm.console import Console
from new_llm.dialogues import ReadReport, read_dialogues
from new_llm.generate import Conversation

# tokens of an answer, and of one that nobody waits for
_SHORT, _LONG = 24, 2000
# letters of a message, turns of a talk, and talks that clients choose from
_LETTERS, _TURNS, _TALKS = 400, 5, 200
# share of the time after which memory should not grow, and what it may: a share and bytes
_WARM, _GROWTH = 0.2, (0.05, 16 << 20)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Talk to a checkpoint from many sides at once."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its checkpoint."""
    data: str
    """Dialogues whose users speak."""
    minutes: float = 10.0
    """How long."""
    clients: int = 16
    """How many at once."""
    session_minutes: float = 0.1
    """After which the server forgets a session; short, so that it happens."""
    max_sessions: int = 24
    """That the server keeps; few, so that some give way to others."""
    seed: int = 0
    """Of what clients do."""
    json: Path | None = None
    """Also write the figures here."""


# what a server may say: asyncio tells of clients that left, and Ctrl-C ends it
_HARMLESS = ("socket.send() raised exception.", "new-llm: interrupted; nothing was written")
Key = tuple[tuple[str, ...], float]
"""What a user said from the beginning of a context on, and the temperature of the answers."""


@dataclass(kw_only=True)
class Told:
    """An answer, and every talk that it may be the last answer of."""

    answer: str
    keys: tuple[Key, ...]


@dataclass(kw_only=True)
class Figures:
    """What clients saw."""

    kinds: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    sessions: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, seconds: float | None = None, num_tokens: int = 0) -> None:
        with self.lock:
            self.kinds[kind] += 1
            self.num_tokens += num_tokens
            if seconds is not None:
                self.seconds.append(seconds)

    def fail(self, what: str) -> None:
        with self.lock:
            self.errors.append(what)

    def heard(self, answer: str, keys: tuple[Key, ...], session: str) -> None:
        with self.lock:
            self.told.append(Told(answer=answer, keys=keys))
            self.sessions.add(session)


class Unexpected(Exception):
    """A status or a stream that should not be."""


WRONG: list[tuple[str, str, Any, int]] = [
    ("POST", "chat/completions", {"messages": []}, 400),
    ("POST", "chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400),
    ("POST", "chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 3}, 400),
    ("POST", "chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400),
    ("POST", "chat/completions", {"messages": [{"role": "user", "content": "x"}],
                                  "temperature": -1}, 400),
    ("POST", "chat/completions", {"model": "other", "messages": [{"role": "user",
                                                                  "content": "x"}]}, 404),
    ("POST", "completions", {"prompt": ""}, 400),
    ("POST", "completions", "{not json", 400),
    ("POST", "sessions/never-begun/fork", {"to": "x"}, 404),
    ("GET", "sessions/never-begun", None, 404),
    ("DELETE", "sessions/never-begun", None, 404),
    ("GET", "nothing", None, 404),
]  # fmt: skip


class Client:
    """One client: does one thing after another until the time is over."""

    def __init__(
        self, number: int, url: str, talks: list[list[str]], options: Options, figures: Figures
    ) -> None:
        self.number = number
        self.talks, self.options, self.figures = talks, options, figures
        self.draw = random.Random(options.seed * 1000 + number)
        self.http = httpx.Client(base_url=f"{url}/v1/", timeout=120)
        self._count = 0

    def run(self, until: float) -> None:
        acts = [self.talk] * 6 + [self.alone] * 2 + [self.wrong, self.leave]
        while time.monotonic() < until:
            act = self.draw.choice(acts)
            try:
                act(until)
            except Unexpected as error:
                self.figures.fail(f"{act.__name__}: {error}")
            except httpx.HTTPError as error:
                self.figures.fail(f"{act.__name__}: {type(error).__name__} {error}")
        self.http.close()

    def new_name(self) -> str:
        self._count += 1
        return f"client {self.number}, {self._count}"

    def talk(self, until: float) -> None:
        """Talk in a session, and perhaps in a fork of it."""
        name, temperature = self.new_name(), self.draw.choice([0.0, 1.0])
        said: list[str] = []
        for text in self.draw.choice(self.talks):
            said.append(text)
            self.turn(name, said, temperature)
            if time.monotonic() > until:
                return
            happens = self.draw.random()
            if happens < 0.15:
                self.fork(name, said, temperature)
            elif happens < 0.25:
                self.interrupt(name, said, temperature)
            elif happens < 0.3:
                # now and then longer than a session is kept
                time.sleep(self.draw.uniform(0.2, 1.5) * 60 * self.options.session_minutes)
        if self.draw.random() < 0.5:
            self.expect("drop", "DELETE", f"sessions/{name}", None, (200, 404))
            self.expect("look", "GET", f"sessions/{name}", None, (404,))
        elif self.draw.random() < 0.1:
            time.sleep(60 * self.options.session_minutes + 0.5)
            self.expect("look", "GET", f"sessions/{name}", None, (404,))

    def turn(self, name: str, said: list[str], temperature: float) -> None:
        """Say the last of `said`, and take note which talk the answer belongs to.

        The server may have forgotten the session, in which case this was its first turn: how many
        there were it says itself, unless it has forgotten it again.
        """
        body = {"messages": [{"role": "user", "content": said[-1]}], "session": name}
        answer = self.ask(body | drawn(temperature, _SHORT))
        turns = self.turns(name)
        if turns is not None and turns > len(said):
            raise Unexpected(f"{turns} turns after {len(said)}")
        possible = range(1, len(said) + 1) if turns is None else [turns]
        keys = tuple((tuple(said[-one:]), temperature) for one in possible)
        self.figures.heard(answer, keys, name)
        if turns is not None and turns < len(said):
            self.figures.note("forgotten, begun again")
            del said[:-turns]

    def turns(self, name: str) -> int | None:
        found = self.expect("look", "GET", f"sessions/{name}", None, (200, 404))
        return found["turns"] if "turns" in found else None

    def fork(self, name: str, said: list[str], temperature: float) -> None:
        """Go on in a copy; what is said there is not said here."""
        to = self.new_name()
        found = self.expect("fork", "POST", f"sessions/{name}/fork", {"to": to}, (200, 404))
        if "turns" not in found:
            return
        copy = [*said[len(said) - found["turns"] :], self.draw.choice(self.talks)[0]]
        self.turn(to, copy, temperature)

    def interrupt(self, name: str, said: list[str], temperature: float) -> None:
        """Go away in the middle of an answer: that turn was not said, unless it was short."""
        before = self.turns(name)
        self.leave(0.0, session=name, temperature=temperature)
        for _ in range(200):
            # it speaks until the server sees that nobody listens
            copy = self.new_name()
            place = f"sessions/{name}/fork"
            found = self.expect("fork", "POST", place, {"to": copy}, (200, 404, 409))
            if "error" not in found:
                self.expect("drop", "DELETE", f"sessions/{copy}", None, (200, 404))
                if found["turns"] != before or before == 1:
                    # told to its end, or forgotten before: what it knows is not what was said. One
                    # turn may be that text itself, of a session that was forgotten meanwhile
                    said.clear()
                    self.expect("drop", "DELETE", f"sessions/{name}", None, (200, 404))
                return
            if found["error"]["code"] == 404:
                return
            time.sleep(0.1)
        raise Unexpected("a session still speaks twenty seconds after its client left")

    def alone(self, until: float) -> None:
        """Ask without a session."""
        temperature = self.draw.choice([0.0, 1.0])
        text = self.draw.choice(self.talks)[0]
        body = {"messages": [{"role": "user", "content": text}], **drawn(temperature, _SHORT)}
        self.figures.heard(self.ask(body), (((text,), temperature),), "")

    def wrong(self, until: float) -> None:
        """Ask for what there is not."""
        method, place, body, status = self.draw.choice(WRONG)
        self.expect("wrong", method, place, body, (status,))

    def leave(self, until: float, **named: Any) -> None:
        """Go away in the middle of a stream."""
        text = self.draw.choice(self.talks)[0]
        temperature = named.pop("temperature", 1.0)
        body = {"messages": [{"role": "user", "content": text}], "stream": True,
                **drawn(temperature, _LONG), **named}  # fmt: skip
        with self.http.stream("POST", "chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Unexpected(f"status {answer.status_code} of a stream")
            lines = answer.iter_lines()
            for _ in range(self.draw.randint(0, 12)):
                if next(lines, None) is None:
                    break
        self.figures.note("left")

    def ask(self, body: dict[str, Any]) -> str:
        """Return an answer, streamed or whole."""
        begun = time.perf_counter()
        if self.draw.random() < 0.5:
            found = self.expect(None, "POST", "chat/completions", body, (200,))
            text, used = found["choices"][0]["message"]["content"], found["usage"]
            kind = "whole"
        else:
            text, used = self.streamed(body)
            kind = "streamed"
        self.figures.note(kind, time.perf_counter() - begun, used["completion_tokens"])
        return text

    def streamed(self, body: dict[str, Any]) -> tuple[str, dict[str, int]]:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        pieces: list[str] = []
        used: dict[str, int] | None = None
        ended = False
        with self.http.stream("POST", "chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Unexpected(f"status {answer.status_code} of a stream")
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Unexpected(f"a stream broke: {event}")
                    used = event.get("usage") or used
                    pieces += [one["delta"].get("content") or "" for one in event["choices"]]
        if not ended or used is None:
            raise Unexpected("a stream broke off")
        return "".join(pieces), used

    def expect(
        self, kind: str | None, method: str, place: str, body: Any, statuses: tuple[int, ...]
    ) -> dict[str, Any]:
        content = body if isinstance(body, str) or body is None else json.dumps(body)
        found = self.http.request(
            method, place, content=content, headers={"Content-Type": "application/json"}
        )
        if found.status_code not in statuses:
            raise Unexpected(f"{method} {place}: status {found.status_code}, {found.text[:200]}")
        if kind is not None:
            self.figures.note(kind)
        return found.json()


def drawn(temperature: float, most: int) -> dict[str, Any]:
    return {"max_tokens": most, "temperature": temperature, "seed": 7, "top_k": 0, "top_p": 1.0}


@contextmanager
def serving(options: Options, figures: Figures) -> Iterator[tuple[str, int]]:
    """Run the server as a user does; yield its address and process."""
    command = [sys.executable, "-m", "new_llm", "serve", str(options.checkpoint), "--port", "0",
               "--session-minutes", str(options.session_minutes),
               "--max-sessions", str(options.max_sessions)]  # fmt: skip
    # a shell's background job is born deaf to Ctrl-C, and so would be the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryFile("w+") as complaints, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=complaints, text=True
    ) as run:  # fmt: skip
        assert run.stdout is not None
        try:
            found = re.search(r"http://[^/]+", run.stdout.readline())
            if found is None:
                complaints.seek(0)
                raise SystemExit(f"the server did not begin: {complaints.read()}")
            yield found[0], run.pid
            if run.poll() is not None:
                figures.fail(f"the server ended by itself with {run.returncode}")
        finally:
            run.send_signal(signal.SIGINT)
        if run.wait(30) != 130:
            figures.fail(f"the server ended with {run.returncode}")
        complaints.seek(0)
        lines = [line for line in complaints if line.strip() not in _HARMLESS]
        if lines:
            figures.fail(f"the server complained: {''.join(lines)[-2000:]}")


class Memory:
    """Watches how much of a process lies in memory."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._begun = time.monotonic()
        self.sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        found = re.search(r"VmRSS:\s+(\d+) kB", self._path.read_text())
        if found is not None:
            self.samples.append((time.monotonic() - self._begun, 1024 * int(found[1])))

    def _watch(self) -> None:
        while not self._ended.wait(2.0):
            self.sample()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.sample()

    def at(self, share: float) -> int:
        """Return the most that there was in the two tenths of the time before a share of it."""
        last = self.samples[-1][0]
        inside = [size for at, size in self.samples if share - 0.2 <= at / last <= share]
        return max(inside or [self.samples[0][1]])


class Alone:
    """What a talk gives in this process, with nobody else there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._known: dict[Key, tuple[Conversation, str]] = {}

    def answer(self, key: Key) -> str:
        return self._talk(key)[1]

    def _talk(self, key: Key) -> tuple[Conversation, str]:
        if key not in self._known:
            said, temperature = key
            config = SampleConfig(
                max_new_tokens=_SHORT, temperature=temperature, seed=7, top_k=0, top_p=1.0
            )
            if len(said) == 1:
                talk = Conversation(self.checkpoint, config)
            else:
                talk = self._talk((said[:-1], temperature))[0].fork()
            messages = [{"role": "user", "content": said[-1]}]
            self._known[key] = talk, "".join(talk.answer(messages, config=config))
        return self._known[key]


def users(source: str) -> list[list[str]]:
    """Return what users say in the first dialogues."""
    rows = read_dialogues(
        source, split="test_sft", on_bad_row="skip", max_dialogues=_TALKS, report=ReadReport()
    )
    talks = [[m["content"][:_LETTERS].strip() for m in row if m["role"] == "user"] for row in rows]
    return [turns for talk in talks if (turns := [text for text in talk if text][:_TURNS])]


def load(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Let clients talk, compare what they heard, and return the figures."""
    talks, figures = users(options.data), Figures()
    seconds = 60.0 * options.minutes
    with serving(options, figures) as (url, pid):
        memory = Memory(pid)
        begun = time.monotonic()
        clients = [Client(n, url, talks, options, figures) for n in range(options.clients)]
        threads = [
            threading.Thread(target=one.run, args=(begun + seconds,), name=f"client {one.number}")
            for one in clients
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - begun
        memory.end()
    say(f"{len(figures.told):,} answers to compare")
    alone = Alone(load_checkpoint(options.checkpoint))
    mixed = [one for one in figures.told if one.answer not in map(alone.answer, one.keys)]
    start, warm, end = memory.samples[0][1], memory.at(_WARM + 0.1), memory.at(1.0)
    share, size = _GROWTH
    if end > warm * (1 + share) + size:
        figures.fail(f"memory grew from {warm / 1e6:.0f} to {end / 1e6:.0f} MB")
    latency = sorted(figures.seconds)

    def at(share: float) -> float:
        return latency[min(int(share * len(latency)), len(latency) - 1)] if latency else 0.0

    return {
        "clients": options.clients, "seconds": round(elapsed, 1),
        "requests": sum(figures.kinds.values()), **figures.kinds,
        "errors": len(figures.errors), "first errors": figures.errors[:5],
        "tokens": figures.num_tokens, "tokens/s": round(figures.num_tokens / elapsed, 1),
        "latency p50, s": round(at(0.5), 3), "latency p99, s": round(at(0.99), 3),
        "RSS at start, MB": round(start / 1e6, 1), "RSS after warm-up, MB": round(warm / 1e6, 1),
        "RSS at the end, MB": round(end / 1e6, 1),
        "sessions checked": len(figures.sessions - {""}), "answers checked": len(figures.told),
        "distinct answers": len({one.answer for one in figures.told}),
        "mixed": len(mixed), "first mixed": [asdict(one) for one in mixed[:2]],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=arguments)
    console = Console()
    found = load(options, console.show)
    shown = [[name, value] for name, value in found.items() if not name.startswith("first")]
    console.table("Serving under load", ["quantity", "value"], shown)
    for name in ("first errors", "first mixed"):
        for one in found[name]:
            console.show(f"{name}: {one}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["errors"] or found["mixed"] else 0


if __name__ == "__main__":
    sys.exit(main())
