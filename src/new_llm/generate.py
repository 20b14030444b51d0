"""Text from a model: the context is the only memory, so a token costs the same at any length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .checkpoint import Checkpoint, load_context, save_context
from .config import SEEDS, SampleConfig
from .dialogues import Messages
from .errors import DataError, NonFiniteError
from .model import NewLLM
from .stepper import Steppers

# tokens of a prompt that are read at once: bounds memory at any length of the prompt
_PROMPT_CHUNK = 1024
# tokens of earlier turns that a conversation keeps to be looked at
RECENT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Where a text has been read to: all that is known of it."""

    context: Tensor
    """`[B, K, C]`; a copy of it is a fork of the text."""
    logits: Tensor
    """Of the next token, `[B, V]`."""


@torch.no_grad()
def read(
    model: NewLLM, ids: Tensor, context: Tensor | None = None, *, real: Tensor | None = None
) -> Reading:
    """Read token ids `[B, T]`, from a context or from none; padding may stand on either side.

    The logits are those after the last real token of each row; `read` at once or in pieces gives
    the same.

    Args:
        model: in evaluation mode.
        ids: token ids.
        context: where an earlier reading ended, `[B, K, C]`.
        real: False at padding, `[B, T]` bool.

    Raises:
        DataError: a row has nothing to read.

    >>> from new_llm.config import ModelConfig
    >>> model = NewLLM(ModelConfig(context_width=8, embedding_width=8, hidden_width=8), 50).eval()
    >>> ids = torch.tensor([[3, 1, 4, 1]])
    >>> first = read(model, ids[:, :2])
    >>> whole, rest = read(model, ids), read(model, ids[:, 2:], first.context)
    >>> torch.allclose(rest.logits, whole.logits, atol=1e-5), whole.context.shape
    (True, torch.Size([1, 2, 8]))
    """
    if ids.shape[1] == 0 or (real is not None and not real.any(dim=1).all()):
        raise DataError("a prompt of at least one token expected, got an empty one; give some text")
    last: Tensor | None = None
    for start in range(0, ids.shape[1], _PROMPT_CHUNK):
        part = slice(start, start + _PROMPT_CHUNK)
        there = None if real is None else real[:, part]
        output = model(ids[:, part], context, real=there)
        context = output.context
        if there is None:
            last = output.features[:, -1]
            continue
        positions = torch.arange(there.shape[1], device=ids.device)
        place = torch.where(there, positions, -1).amax(dim=1)
        found = output.features[torch.arange(len(ids), device=ids.device), place.clamp(min=0)]
        last = found if last is None else torch.where((place >= 0)[:, None], found, last)
    assert context is not None and last is not None
    return Reading(context=context, logits=model.logits(last))


def sample(
    logits: Tensor, config: SampleConfig, generator: torch.Generator, seen: Tensor | None = None
) -> Tensor:
    """Draw one token of each row of `[B, V]`; `seen` `[B, V]` marks tokens that are penalised.

    >>> config = SampleConfig(temperature=0.0)
    >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), config, torch.Generator())
    tensor([1])
    """
    logits = logits.float()
    if not torch.isfinite(logits).all():
        raise NonFiniteError("finite logits expected, got NaN or infinity; train again")
    if seen is not None and config.repetition_penalty != 1.0:
        penalty = config.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if config.temperature == 0.0:
        return logits.argmax(dim=-1)
    size = logits.shape[-1]
    if not 0 < config.top_k < size and config.top_p == 1.0:
        # nothing is left out, so nothing has to be sorted
        probability = (logits / config.temperature).softmax(dim=-1)
        return torch.multinomial(probability, 1, generator=generator)[:, 0]
    # most likely first: what is left out stands at the end
    likely, place = logits.topk(config.top_k if 0 < config.top_k < size else size, dim=-1)
    probability = (likely / config.temperature).softmax(dim=-1)
    if config.top_p < 1.0:
        # the token that crosses the share is kept, so at least one always is
        dropped = probability.cumsum(dim=-1) - probability >= config.top_p
        probability = probability.masked_fill(dropped, 0.0)
    drawn = torch.multinomial(probability, 1, generator=generator)
    return place.gather(1, drawn)[:, 0]


@torch.no_grad()
def stream(
    model: NewLLM,
    reading: Reading,
    config: SampleConfig,
    *,
    stop_ids: tuple[int, ...] = (),
    on_token: Callable[[int], None] | None = None,
    on_reading: Callable[[Reading], None] | None = None,
    steppers: Steppers | None = None,
) -> Iterator[int]:
    """Draw token after token of one text until a stop token or `max_new_tokens`.

    A stop token is read into the context but not yielded. `on_token` is told of every token that
    was read, and `on_reading` handed every new reading, the last of which is where the text can be
    continued. `steppers` keeps what one text prepares for the next.
    """
    generator = torch.Generator().manual_seed(config.seed)
    seen = None
    if config.repetition_penalty != 1.0:
        seen = torch.zeros_like(reading.logits, dtype=torch.bool)
    read_on = _reader(model, config.max_new_tokens, steppers or Steppers())
    for _ in range(config.max_new_tokens):
        token = int(sample(reading.logits.cpu(), config, generator, seen))
        if seen is not None:
            seen[0, token] = True
        reading = read_on(reading, token)
        if on_token is not None:
            on_token(token)
        if on_reading is not None:
            on_reading(reading)
        if token in stop_ids:
            return
        yield token


def _reader(
    model: NewLLM, num_tokens: int, steppers: Steppers
) -> Callable[[Reading, int], Reading]:
    """Return what reads one more token of one text."""
    if model.config.scope == "sequence":
        step = steppers(model, num_tokens)

        def read_on(reading: Reading, token: int) -> Reading:
            context = reading.context.clone()
            return Reading(logits=step(token, context)[None], context=context)

        return read_on

    def read_again(reading: Reading, token: int) -> Reading:
        return read(model, torch.tensor([[token]], device=reading.context.device), reading.context)

    return read_again


class Speech:
    """Text that a model says after token ids; iterate it for pieces, then ask what came of it.

    Args:
        checkpoint: whose model speaks.
        ids: read first, at least one.
        config: how tokens are drawn.
        context: where an earlier reading ended, `[1, K, C]`; None is the beginning of a text.
        stop_ids: tokens that end it, read but not shown.
        stop: strings that end it, not shown; the context has read the token that completes one.

    Raises:
        DataError: there is nothing to read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: list[int],
        config: SampleConfig,
        *,
        context: Tensor | None = None,
        stop_ids: tuple[int, ...] = (),
        stop: tuple[str, ...] = (),
    ) -> None:
        if not ids:
            raise DataError("some text to read expected, got none; give at least one character")
        self.checkpoint = checkpoint
        self.config = config
        self.ids = list(ids)
        """All that was read so far."""
        self.num_prompt = len(ids)
        self.num_drawn = 0
        """Tokens drawn, a stop token included."""
        self.finish: Literal["stop", "length"] | None = None
        """Why it ended; None while it goes on."""
        self.context = context
        """After `ids`, `[1, K, C]`."""
        self._stop_ids = stop_ids
        self._shown = _Shown(checkpoint.tokenizer.stream_decoder(), stop)

    def __iter__(self) -> Iterator[str]:
        """Yield a piece for each part of a long prompt, then for each token.

        A piece may be empty: while the prompt is read, where a character needs more tokens, and
        where a stop string may have begun. Whoever serves several texts can turn to the next one
        after each.
        """
        model = self.checkpoint.model
        prompt = torch.tensor([self.ids], device=model.embedding.weight.device)
        *parts, last = prompt.split(_PROMPT_CHUNK, dim=1)
        for part in parts:
            self.context = read(model, part, self.context).context
            yield ""
        reading = read(model, last, self.context)
        self.context = reading.context

        def keep(found: Reading) -> None:
            self.context = found.context

        drawn = stream(
            model,
            reading,
            self.config,
            stop_ids=self._stop_ids,
            on_token=self._note,
            on_reading=keep,
            steppers=self.checkpoint.steppers,
        )
        for token in drawn:
            piece = self._shown.add(token)
            if self._shown.stopped:
                self.finish = "stop"
                yield piece
                return
            yield piece
        self.finish = "stop" if self.ids[-1] in self._stop_ids else "length"
        yield self._shown.rest()

    def _note(self, token: int) -> None:
        self.ids.append(token)
        self.num_drawn += 1


class _Shown:
    """Tokens to pieces of text, nothing of a stop string among them."""

    def __init__(self, decode: Callable[[int], str], stop: tuple[str, ...]) -> None:
        self.stopped = False
        self._decode, self._stop = decode, stop
        self._held = ""

    def add(self, token: int) -> str:
        """Return what can be shown now."""
        self._held += self._decode(token)
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        # the longest end that a stop string begins with waits for the next token
        size = max(
            (
                n
                for text in self._stop
                for n in range(1, min(len(text), len(self._held) + 1))
                if self._held.endswith(text[:n])
            ),
            default=0,
        )
        shown, self._held = self._held[: len(self._held) - size], self._held[-size:] * bool(size)
        return shown

    def rest(self) -> str:
        """Return what waited for a stop string that did not come."""
        return self._held


def generate(checkpoint: Checkpoint, prompt: str, config: SampleConfig) -> str:
    """Return the continuation of a prompt, without the prompt, up to the next role token.

    Raises:
        DataError: the prompt is empty.

    >>> from new_llm.tokenizer import ChatTokenizer
    >>> from new_llm.config import ModelConfig, SampleConfig
    >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model = NewLLM(small, tokenizer.vocab_size).eval()
    >>> checkpoint = Checkpoint(model=model, tokenizer=tokenizer, config={})
    >>> text = generate(checkpoint, "hello", SampleConfig(max_new_tokens=5, seed=1))
    >>> text == generate(checkpoint, "hello", SampleConfig(max_new_tokens=5, seed=1))
    True
    """
    tokenizer = checkpoint.tokenizer
    stops = (tokenizer.im_start_id, tokenizer.im_end_id)
    return "".join(Speech(checkpoint, tokenizer.encode(prompt), config, stop_ids=stops))


class Conversation:
    """A chat whose memory is one context; `fork` copies it, `save` and `load` keep it.

    Args:
        checkpoint: what speaks.
        config: how its answers are drawn.

    >>> from new_llm.tokenizer import ChatTokenizer
    >>> from new_llm.config import ModelConfig, SampleConfig
    >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model = NewLLM(small, tokenizer.vocab_size).eval()
    >>> checkpoint = Checkpoint(model=model, tokenizer=tokenizer, config={})
    >>> talk = Conversation(checkpoint, SampleConfig(max_new_tokens=3))
    >>> heard = "".join(talk.reply("hello"))
    >>> talk.num_turns, tuple(talk.context.shape)
    (1, (1, 2, 8))
    >>> other = talk.fork()
    >>> "".join(other.reply("again")) == "".join(talk.reply("again"))
    True
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.context: Tensor | None = None
        """What is remembered, `[1, K, C]`; None is nothing yet."""
        self.num_turns = 0
        self.last: Speech | None = None
        """The latest answer."""
        self.recent: list[int] = []
        """Token ids that were read last, at most `RECENT` of earlier turns: for looking at."""
        self.before: Tensor | None = None
        """The context before `recent`, `[1, K, C]`; None is the beginning."""

    def reply(self, text: str) -> Iterator[str]:
        """Say `text` as the user; yield the assistant's answer piece by piece.

        Raises:
            DataError: the text is empty, or no UTF-8.
        """
        if not text.strip():
            raise DataError("a message with some text expected, got an empty one")
        return self.answer([{"role": "user", "content": text}])

    def answer(
        self, messages: Messages, *, config: SampleConfig | None = None, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """Read messages; yield the assistant's answer piece by piece, as `Speech` does.

        The conversation moves on when the last piece was taken: what is not heard out was not said.

        Args:
            messages: `role` and `content` of each; none lets the assistant speak first.
            config: how this answer is drawn; None as the others, with a seed of its own.
            stop: strings that end the answer.

        Raises:
            DataError: a content is no UTF-8.
        """
        return self.answer_ids(
            self.checkpoint.tokenizer.encode_prompt(messages), config=config, stop=stop
        )

    def answer_ids(
        self, ids: list[int], *, config: SampleConfig | None = None, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """As `answer`, of messages that `encode_prompt` has turned into token ids already."""
        tokenizer, model = self.checkpoint.tokenizer, self.checkpoint.model
        if config is None:
            config = replace(self.config, seed=(self.config.seed + self.num_turns) % SEEDS)
        said = Speech(self.checkpoint, ids, config, context=self.context,
                      stop_ids=(tokenizer.im_end_id,), stop=stop)  # fmt: skip

        def told() -> Iterator[str]:
            yield from said
            ended = [tokenizer.im_end_id] if said.ids[-1] != tokenizer.im_end_id else []
            closing = ended + tokenizer.encode("\n")
            device = model.embedding.weight.device
            after = read(model, torch.tensor([closing], device=device), said.context)
            self._forget_oldest()
            self.context, self.last = after.context, said
            self.recent += said.ids + closing
            self.num_turns += 1

        return told()

    def _forget_oldest(self) -> None:
        """Keep no more than `RECENT` tokens to look at."""
        oldest = self.recent[: max(len(self.recent) - RECENT, 0)]
        if oldest:
            model = self.checkpoint.model
            ids = torch.tensor([oldest], device=model.embedding.weight.device)
            self.before = read(model, ids, self.before).context
            del self.recent[: len(oldest)]

    def fork(self) -> "Conversation":
        """Return a second conversation that goes on from here."""
        other = Conversation(self.checkpoint, self.config)
        # a context is replaced, never changed in place
        other.context, other.num_turns, other.last = self.context, self.num_turns, self.last
        other.recent, other.before = [*self.recent], self.before
        return other

    def let_go(self) -> None:
        """Keep the context alone: the talk can go on, but nothing of it be looked at."""
        self.before, self.recent, self.last = self.context, [], None

    def reset(self) -> None:
        """Forget everything."""
        self._go_on_from(None)

    def _go_on_from(self, context: Tensor | None) -> None:
        self.context = self.before = context
        self.num_turns, self.last, self.recent = 0, None, []

    def save(self, path: Path) -> None:
        """Write the context as safetensors.

        Raises:
            CheckpointError: `path` cannot be written.
            DiskFullError: there was no room.
        """
        context = self.context
        if context is None:
            context = self.checkpoint.model.initial_context(1)
        save_context(path, context, self.checkpoint.model)

    def load(self, path: Path) -> None:
        """Go on from a saved context.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """
        self._go_on_from(load_context(path, self.checkpoint.model))
