"""Text from a model: the context is the only memory, so a token costs the same at any length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, load_tensors, save_tensors
from .config import SEEDS, SampleConfig
from .errors import CheckpointError, DataError, NonFiniteError
from .model import NewLLM
from .stepper import Stepper

# tokens of a prompt that are read at once: bounds memory at any length of the prompt
_PROMPT_CHUNK = 1024
# a table of the vocabulary is made for texts of this share of it
_TABLE_SHARE = 16


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
    # most likely first: what is left out stands at the end
    size = logits.shape[-1]
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
    on_reading: Callable[[Reading], None] | None = None,
) -> Iterator[int]:
    """Draw token after token of one text until a stop token or `max_new_tokens`.

    A stop token is read into the context but not yielded. `on_reading` is handed every new reading,
    the last of which is where the text can be continued.
    """
    generator = torch.Generator().manual_seed(config.seed)
    seen = None
    if config.repetition_penalty != 1.0:
        seen = torch.zeros_like(reading.logits, dtype=torch.bool)
    read_on = _reader(model, config.max_new_tokens)
    for _ in range(config.max_new_tokens):
        token = sample(reading.logits.cpu(), config, generator, seen)
        if seen is not None:
            seen[0, token] = True
        reading = read_on(reading, int(token))
        if on_reading is not None:
            on_reading(reading)
        if int(token) in stop_ids:
            return
        yield int(token)


def _reader(model: NewLLM, num_tokens: int) -> Callable[[Reading, int], Reading]:
    """Return what reads one more token of one text."""
    if model.config.scope == "sequence":
        # a table of the vocabulary is worth its making only to a long text
        step = Stepper(model, tabled=num_tokens >= model.vocab_size // _TABLE_SHARE)

        def read_on(reading: Reading, token: int) -> Reading:
            context = reading.context.clone()
            return Reading(logits=step(token, context)[None], context=context)

        return read_on

    def read_again(reading: Reading, token: int) -> Reading:
        return read(model, torch.tensor([[token]], device=reading.context.device), reading.context)

    return read_again


def generate(checkpoint: Checkpoint, prompt: str, config: SampleConfig) -> str:
    """Return the continuation of a prompt, without the prompt.

    Raises:
        DataError: the prompt is empty.
    """
    ids = checkpoint.tokenizer.encode(prompt)
    if not ids:
        raise DataError("--prompt needs some text, got none; give at least one character")
    return continue_ids(checkpoint, ids, config)


def continue_ids(checkpoint: Checkpoint, ids: list[int], config: SampleConfig) -> str:
    """Return the text that follows token ids, up to the next role token."""
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    reading = read(model, torch.tensor([ids], device=model.embedding.weight.device))
    stops = (tokenizer.im_start_id, tokenizer.im_end_id)
    return tokenizer.decode(list(stream(model, reading, config, stop_ids=stops)))


class Conversation:
    """A chat whose memory is one context; `fork` copies it, `save` and `load` keep it."""

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.context: Tensor | None = None
        self.num_turns = 0

    def reply(self, text: str) -> Iterator[str]:
        """Say `text` as the user; yield the assistant's answer piece by piece.

        Raises:
            DataError: the text is empty, or no UTF-8.
        """
        if not text.strip():
            raise DataError("a message with some text expected, got an empty one")
        tokenizer, model = self.checkpoint.tokenizer, self.checkpoint.model
        ids = tokenizer.encode_prompt([{"role": "user", "content": text}])
        device = model.embedding.weight.device
        reading = read(model, torch.tensor([ids], device=device), self.context)
        latest = [reading]
        drawn_by = replace(self.config, seed=(self.config.seed + self.num_turns) % SEEDS)
        drawn: list[int] = []
        shown = ""
        tokens = stream(
            model,
            reading,
            drawn_by,
            stop_ids=(tokenizer.im_end_id,),
            on_reading=lambda found: latest.__setitem__(0, found),
        )
        for token in tokens:
            drawn.append(token)
            whole = tokenizer.decode(drawn)
            # a character may need several tokens; half of one is not shown
            if not whole.endswith("\ufffd"):
                yield whole[len(shown) :]
                shown = whole
        closing = tokenizer.encode("\n")
        ended = read(model, torch.tensor([closing], device=device), latest[0].context)
        self.context = ended.context
        self.num_turns += 1

    def fork(self) -> "Conversation":
        """Return a second conversation that goes on from here."""
        other = Conversation(self.checkpoint, self.config)
        other.context = None if self.context is None else self.context.clone()
        other.num_turns = self.num_turns
        return other

    def reset(self) -> None:
        """Forget everything."""
        self.context, self.num_turns = None, 0

    def save(self, path: Path) -> None:
        """Write the context as safetensors.

        Raises:
            CheckpointError: `path` cannot be written.
            DiskFullError: there was no room.
        """
        context = self.context
        if context is None:
            context = self.checkpoint.model.initial_context(1)
        save_tensors(path, {"context": context})

    def load(self, path: Path) -> None:
        """Go on from a saved context.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """
        context = load_tensors(path, "a saved context").get("context")
        wanted = self.checkpoint.model.initial_context(1)
        if context is None or context.shape != wanted.shape:
            given = None if context is None else tuple(context.shape)
            raise CheckpointError(
                f"a context of shape {tuple(wanted.shape)} expected, {path} holds {given}; "
                "load one that this model saved"
            )
        self.context = context.to(wanted.device)
