"""An endpoint that clients of OpenAI's chat API can talk to, over FastAPI and uvicorn.

One thread owns the model and takes all texts in turns, a token each: every client gets the answer
that it would get alone, bit by bit, and a long prompt holds up nobody. A session keeps the context
of a talk by its id, so that only what is new has to be sent and read.
"""

import asyncio
import json
import secrets
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from .address import listening
from .checkpoint import Checkpoint
from .config import SEEDS, SampleConfig
from .errors import ConfigError, NewLLMError, shown
from .generate import Conversation, Speech

# texts that are told at once; more are sent away with 429
MAX_TEXTS = 256
# longest body of a request, bytes
MAX_BODY = 16 * 2**20
# strings that end a text: each is looked for after every token
MAX_STOPS = 16


class _Refused(Exception):
    """A request that cannot be served, in the words of OpenAI's errors."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def _writable(name: str) -> str:
    """Return a name that an answer can hold.

    Raises:
        ValueError: it is no UTF-8.
    """
    if not name.isprintable():
        raise ValueError("characters that can be shown expected")
    return name


# of a session; it is kept, and stands in addresses and answers
_Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_writable)]


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        """Return role and text as our dialogues have them.

        Raises:
            _Refused: a part is no text.
        """
        content = self.content
        if not isinstance(content, str):
            if any(part.type != "text" for part in content):
                raise _Refused("contents of type text expected; leave the others out")
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _Options(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both endpoints are asked for."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: _Options | None = None

    def limit(self) -> int | None:
        """Return how many tokens may be drawn."""
        return self.max_tokens

    def drawn_by(self, config: SampleConfig) -> SampleConfig:
        """Return how tokens are drawn: what the request says, and the server's own elsewhere.

        Without a seed each answer is drawn by another one.

        Raises:
            _Refused: a value is out of its range, or asks for what this model cannot do.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise _Refused(
                    f"{name} is not supported here, got {shown(value)}; leave it out", param=name
                )
        named = {"max_new_tokens": self.limit(), "temperature": self.temperature,
                 "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed,
                 "repetition_penalty": self.repetition_penalty}  # fmt: skip
        given = {name: value for name, value in named.items() if value is not None}
        try:
            return replace(config, **({"seed": secrets.randbelow(SEEDS)} | given))
        except ConfigError as error:
            # its first word is the setting, which most fields are called by
            name = str(error).partition(" ")[0]
            field = name if name in type(self).model_fields else None
            raise _Refused(str(error), param=field) from None

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end the text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


# fields that change an answer in ways that we do not have, and values that change nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None), "best_of": (1, None), "echo": (False, None), "suffix": (None, ""),
    "logprobs": (False, None, 0), "top_logprobs": (None, 0), "logit_bias": (None, {}),
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "tools": (None, []),
    "functions": (None, []), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,),
}  # fmt: skip


class _ChatAsked(_Asked):
    messages: list[_Message]
    max_completion_tokens: int | None = None
    session: _Name | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class _TextAsked(_Asked):
    prompt: str | list[str]


class _ForkAsked(BaseModel):
    to: _Name


class Turns:
    """A thread that tells texts in turns, a piece each; whoever listens is told from there."""

    def __init__(self) -> None:
        self._texts: deque[_Text] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._texts)

    def add(
        self,
        begin: Callable[[], Iterator[str]],
        tell: Callable[[Any], None],
        over: Callable[[], None] = lambda: None,
    ) -> "_Text":
        """Tell a text: `tell` is called with each piece, then with None or with an error.

        However it ends, cancelled too, `over` is called before that last time: from then on this
        thread changes nothing that the text belongs to.
        """
        text = _Text(begin=begin, tell=tell, over=over)
        with self._changed:
            self._texts.append(text)
            self._changed.notify()
        return text

    def close(self) -> None:
        """Stop after the piece that is being told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._texts and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                text = self._texts[0]
            goes_on = text.go_on()
            with self._changed:
                self._texts.popleft()
                if goes_on:
                    self._texts.append(text)


@dataclass(kw_only=True)
class _Text:
    begin: Callable[[], Iterator[str]]
    tell: Callable[[Any], None]
    over: Callable[[], None]
    cancelled: bool = False
    pieces: Iterator[str] | None = None

    def go_on(self) -> bool:
        """Tell the next piece; return whether there may be more."""
        told: str | Exception | None = None
        try:
            if not self.cancelled:
                if self.pieces is None:
                    self.pieces = self.begin()
                told = next(self.pieces, None)
        # whoever waits for the text must hear of any error, or would wait for ever
        except Exception as error:
            told = error
        goes_on = isinstance(told, str)
        if not goes_on:
            self.over()
        self.tell(told)
        return goes_on


@dataclass(kw_only=True)
class _Session:
    conversation: Conversation
    used: float
    speaking: bool = False


@dataclass(kw_only=True)
class Sessions:
    """Talks by id; the ones that are not used are forgotten."""

    checkpoint: Checkpoint
    config: SampleConfig
    minutes: float
    """Time after which an unused one is forgotten."""
    most: int
    """How many are kept; the one that was used longest ago gives way."""
    clock: Callable[[], float] = time.monotonic
    _kept: "OrderedDict[str, _Session]" = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        self._drop_old()
        return len(self._kept)

    def get(self, name: str) -> _Session:
        """Return a session.

        Raises:
            _Refused: there is none of that id.
        """
        self._drop_old()
        if name not in self._kept:
            raise _Refused(
                f"the id of a session expected, got {shown(name)}; it was never used, or not for "
                f"{self.minutes:g} minutes",
                status=404,
            )
        return self._kept[name]

    def begin(self, name: str) -> Conversation:
        """Return the talk of a session, a new one where there is none, for one answer.

        Raises:
            _Refused: it is speaking, or all sessions that there may be are.
        """
        self._drop_old()
        if name not in self._kept:
            self._add(name, Conversation(self.checkpoint, self.config))
        session = self._kept[name]
        if session.speaking:
            raise _Refused(f"session {name!r} is speaking; wait for its answer", status=409)
        session.speaking = True
        return session.conversation

    def end(self, name: str, conversation: Conversation) -> None:
        """Take note that an answer has ended: from now on the session is unused."""
        session = self._kept.get(name)
        # it may have been forgotten meanwhile, and begun anew
        if session is not None and session.conversation is conversation:
            session.speaking = False
            self._touch(name)

    def fork(self, name: str, to: str) -> _Session:
        """Return a new session that goes on where another one stands.

        Raises:
            _Refused: there is no such session, it is speaking, or there is one of the new id.
        """
        origin = self.get(name)
        if origin.speaking:
            raise _Refused(f"session {name!r} is speaking; wait for its answer", status=409)
        if to in self._kept:
            raise _Refused(f"a new id expected, there is a session {to!r}", status=409)
        self._add(to, origin.conversation.fork())
        return self._kept[to]

    def drop(self, name: str) -> None:
        """Forget a session.

        Raises:
            _Refused: there is none of that id.
        """
        self.get(name)
        del self._kept[name]

    def _touch(self, name: str) -> None:
        self._kept[name].used = self.clock()
        self._kept.move_to_end(name)

    def _add(self, name: str, conversation: Conversation) -> None:
        if len(self._kept) >= self.most:
            idle = next((key for key, one in self._kept.items() if not one.speaking), None)
            if idle is None:
                raise _Refused("all sessions are in use; try again later", status=429)
            del self._kept[idle]
        self._kept[name] = _Session(conversation=conversation, used=self.clock())

    def _drop_old(self) -> None:
        # the one that was used longest ago comes first
        oldest = self.clock() - 60.0 * self.minutes
        old = [name for name, one in self._kept.items() if one.used < oldest and not one.speaking]
        for name in old:
            del self._kept[name]


class Endpoint:
    """The application: a checkpoint, its sessions, and the thread that speaks.

    Args:
        name: of the model, for clients.
        sessions: kept talks, and how tokens are drawn where a request does not say.
    """

    def __init__(self, name: str, sessions: Sessions) -> None:
        self.name, self.sessions = name, sessions
        self.checkpoint, self.config = sessions.checkpoint, sessions.config
        self.turns: Turns | None = None
        self.begun = int(time.time())
        self.app = FastAPI(title="New-LLM", lifespan=self._living, openapi_url="/openapi.json")
        self._route()

    @asynccontextmanager
    async def _living(self, app: FastAPI) -> AsyncIterator[None]:
        self.turns = Turns()
        yield
        self.turns.close()

    def _route(self) -> None:
        app = self.app
        app.add_exception_handler(_Refused, _refusal)
        app.add_exception_handler(RequestValidationError, _not_understood)
        app.add_exception_handler(HTTPException, _not_found)
        app.add_middleware(_Bounded)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name}")(self.model)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/v1/completions", response_model=None)(self.complete)
        app.get("/v1/sessions/{name}")(self.session)
        app.delete("/v1/sessions/{name}")(self.drop)
        app.post("/v1/sessions/{name}/fork")(self.fork)

    async def health(self) -> dict[str, Any]:
        """Return what the server is at."""
        waiting = 0 if self.turns is None else len(self.turns)
        return {"status": "ok", "texts": waiting, "sessions": len(self.sessions)}

    async def models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the one model."""
        self._require_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.begun, "owned_by": "new-llm"}

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise _Refused(f"the model {self.name!r} is served here, got {shown(name)}", status=404,
                           param="model")  # fmt: skip

    async def session(self, name: str) -> dict[str, Any]:
        """Say how far a session is."""
        found = self.sessions.get(name)
        left = found.used + 60.0 * self.sessions.minutes - self.sessions.clock()
        return {"id": name, "object": "session", "turns": found.conversation.num_turns,
                "seconds_left": round(left, 1)}  # fmt: skip

    async def drop(self, name: str) -> dict[str, Any]:
        """Forget a session."""
        self.sessions.drop(name)
        return {"id": name, "object": "session", "deleted": True}

    async def fork(self, name: str, asked: _ForkAsked) -> dict[str, Any]:
        """Begin a session that goes on where another one stands."""
        self.sessions.fork(name, asked.to)
        return await self.session(asked.to)

    async def chat(self, asked: _ChatAsked, request: Request) -> JSONResponse | StreamingResponse:
        """Answer messages; in a session, those that are new to it."""
        self._require_model(asked.model)
        messages = [message.plain() for message in asked.messages]
        if not any(message["content"].strip() for message in messages):
            raise _Refused("a message with some text expected, got none", param="messages")
        config, stops = asked.drawn_by(self.config), asked.stops()
        # seconds, where a text is long: others are told theirs meanwhile
        ids = await asyncio.to_thread(_ids, self.checkpoint.tokenizer.encode_prompt, messages)
        self._require_room()
        named = asked.session
        if named is None:
            talk = Conversation(self.checkpoint, self.config)
        else:
            talk = self.sessions.begin(named)
        said: list[Speech | None] = []

        def begin() -> Iterator[str]:
            yield from talk.answer_ids(ids, config=config, stop=stops)
            said.append(talk.last)
            # what is kept of a session is its context, however long its texts were
            talk.let_go()

        def ended() -> None:
            if named is not None:
                self.sessions.end(named, talk)

        told = _Told(self, begin, lambda: said[0], ended)
        shape = _Shape(
            kind="chat.completion", id=f"chatcmpl-{uuid.uuid4().hex}", model=self.name,
            session=named,
        )  # fmt: skip
        return await told.response(shape, asked, request)

    async def complete(
        self, asked: _TextAsked, request: Request
    ) -> JSONResponse | StreamingResponse:
        """Continue a prompt."""
        self._require_model(asked.model)
        prompt = asked.prompt
        if not isinstance(prompt, str):
            if len(prompt) != 1:
                raise _Refused(f"one prompt expected, got {len(prompt)}", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise _Refused("a prompt with some text expected, got an empty one", param="prompt")
        config, stops = asked.drawn_by(self.config), asked.stops()
        tokenizer = self.checkpoint.tokenizer
        ids = await asyncio.to_thread(_ids, tokenizer.encode, prompt)
        self._require_room()
        roles = (tokenizer.im_start_id, tokenizer.im_end_id)
        speech: list[Speech] = []

        def begin() -> Iterator[str]:
            speech.append(Speech(self.checkpoint, ids, config, stop_ids=roles, stop=stops))
            return iter(speech[0])

        told = _Told(self, begin, lambda: speech[0], lambda: None)
        shape = _Shape(
            kind="text_completion", id=f"cmpl-{uuid.uuid4().hex}", model=self.name, session=None
        )
        return await told.response(shape, asked, request)

    def _require_room(self) -> None:
        if self.turns is None or len(self.turns) >= MAX_TEXTS:
            raise _Refused(f"{MAX_TEXTS} texts are told already; try again later", status=429)


def _ids(encode: Callable[[Any], list[int]], text: Any) -> list[int]:
    """Return the token ids of what a client said.

    Raises:
        _Refused: it is no UTF-8.
    """
    try:
        return encode(text)
    except NewLLMError as error:
        raise _Refused(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """How an answer is written down."""

    kind: Literal["chat.completion", "text_completion"]
    id: str
    model: str
    session: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, said: Speech) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": said.finish, "logprobs": None}
        if self.kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return self._around([choice], self.kind) | {"usage": _usage(said)}

    def piece(self, text: str | None, *, first: bool = False, finish: str | None = None) -> Any:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self.kind == "chat.completion":
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role | ({} if text is None else {"content": text})
            return self._around([choice], "chat.completion.chunk")
        choice["text"] = text or ""
        return self._around([choice], self.kind)

    def used(self, said: Speech) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return self._around([], kind) | {"usage": _usage(said)}

    def _around(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        named = {} if self.session is None else {"session": self.session}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices} | named  # fmt: skip


def _usage(said: Speech) -> dict[str, int]:
    return {"prompt_tokens": said.num_prompt, "completion_tokens": said.num_drawn,
            "total_tokens": said.num_prompt + said.num_drawn}  # fmt: skip


class _Told:
    """One text on its way from the thread that speaks to a client."""

    def __init__(
        self,
        endpoint: Endpoint,
        begin: Callable[[], Iterator[str]],
        said: Callable[[], Speech | None],
        ended: Callable[[], None],
    ) -> None:
        self._said = said
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def soon(call: Callable[..., None], *values: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(call, *values)

        assert endpoint.turns is not None
        # a session speaks until its thread is done with it, which may be after its client has left:
        # the piece at work then may be the last, and the turn counts
        self._text = endpoint.turns.add(
            begin, lambda piece: soon(self._queue.put_nowait, piece), lambda: soon(ended)
        )

    async def response(
        self, shape: _Shape, asked: _Asked, request: Request
    ) -> JSONResponse | StreamingResponse:
        """Return the whole answer, or one that is still being told."""
        if asked.stream:
            try:
                # what is wrong with a request shows before an answer begins
                first = await self._next()
            except BaseException:
                self.stop()
                raise
            return _Stream(self, self._streamed(shape, asked, first))
        gone = asyncio.create_task(_gone(request))
        try:
            text = await self._whole(gone)
        finally:
            gone.cancel()
            self.stop()
        said = self._said()
        assert said is not None
        return JSONResponse(shape.whole(text, said))

    async def _next(self) -> str | None:
        """Return the next piece; None at the end."""
        return _opened(await self._queue.get())

    async def _whole(self, gone: "asyncio.Task[None]") -> str:
        pieces: list[str] = []
        while True:
            coming = asyncio.create_task(self._next())
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                raise _Refused("the client went away", status=499)
            piece = await coming
            # a task for each token would cost more than the token
            while piece is not None and not self._queue.empty():
                pieces.append(piece)
                piece = _opened(self._queue.get_nowait())
            if piece is None:
                return "".join(pieces)
            pieces.append(piece)

    async def _streamed(
        self, shape: _Shape, asked: _Asked, piece: str | None
    ) -> AsyncIterator[str]:
        first = True
        try:
            while piece is not None:
                if piece or first:
                    yield _event(shape.piece(piece, first=first))
                    first = False
                piece = await self._next()
        except _Refused as error:
            # the answer has begun: its status cannot be changed any more
            yield _event(_error(error))
            return
        said = self._said()
        assert said is not None
        yield _event(shape.piece(None, first=first, finish=said.finish))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event(shape.used(said))
        yield "data: [DONE]\n\n"

    def stop(self) -> None:
        """Let nothing more be told."""
        self._text.cancelled = True


def _opened(told: Any) -> str | None:
    """Return a piece as it was told, or raise what went wrong."""
    if isinstance(told, NewLLMError):
        raise _Refused(str(told), status=400 if told.exit_code == 2 else 500)
    if isinstance(told, Exception):
        raise told
    return told


class _Stream(StreamingResponse):
    """Stops its text however it ends, also where it never began."""

    def __init__(self, told: _Told, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._told.stop()


async def _gone(request: Request) -> None:
    """Wait until a client has gone away."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(error: _Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param,
                      "code": error.status}}  # fmt: skip


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _Refused)
    again = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(_error(error), status_code=error.status, headers=again)


async def _not_found(request: Request, error: Exception) -> JSONResponse:
    """Say in the words of our errors that there is no such place, or that a body is no JSON."""
    assert isinstance(error, HTTPException)
    wrong = _Refused(f"{request.method} {request.url.path}: {error.detail}",
                     status=error.status_code)  # fmt: skip
    return JSONResponse(_error(wrong), status_code=error.status_code, headers=error.headers)


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        wrong = _Refused(
            f"a body in JSON expected, it is none from character {first['loc'][-1]} on"
        )
        return JSONResponse(_error(wrong), status_code=400)
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    wrong = _Refused(f"{place or 'the request'}: {first['msg']}", param=place or None)
    return JSONResponse(_error(wrong), status_code=400)


class _Bounded:
    """Refuses bodies that no talk needs, before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        endless = b"transfer-encoding" in headers
        if endless or not length.isdigit() or len(length) > 19 or int(length) > MAX_BODY:
            given = "an unknown number" if endless else length.decode("latin-1")
            error = _Refused(f"at most {MAX_BODY:,} bytes expected, got {given}", status=413)
            await JSONResponse(_error(error), status_code=413)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def serve(endpoint: Endpoint, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Args:
        endpoint: what is served.
        host: address to listen at.
        port: of it; 0 takes a free one.
        say: told the address once it is open.

    Raises:
        ConfigError: there is no such address here, or it is taken.
    """
    with listening(host, port) as bound:
        place = f"[{host}]" if ":" in host else host
        say(f"{endpoint.name} at http://{place}:{bound.getsockname()[1]}/v1 (Ctrl-C ends it)")
        config = uvicorn.Config(endpoint.app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[bound])
