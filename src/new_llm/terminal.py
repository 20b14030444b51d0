"""A conversation in the terminal, and what can be done with its context on the way."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint
from .config import SampleConfig
from .console import Console, printable
from .errors import NewLLMError
from .generate import Conversation
from .view import distance, view

_FIRST = "main"


@dataclass(frozen=True, kw_only=True)
class _Action:
    """What a word with a slash does."""

    call: Callable[[str], None]
    argument: str
    says: str


class Chat:
    """Reads what the user says, shows the answer as it is drawn, and how settled the context is.

    Branches are conversations that were forked from one another; each has a name.
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig) -> None:
        self.branches = {_FIRST: Conversation(checkpoint, config)}
        self.name = _FIRST
        self.ended = False
        self._console = Console()
        self._actions = {
            "/reset": _Action(call=self._reset, argument="", says="forget everything"),
            "/save": _Action(call=self._save, argument="FILE", says="keep the context"),
            "/load": _Action(call=self._load, argument="FILE", says="go on from a kept context"),
            "/fork": _Action(call=self._fork, argument="NAME", says="go on in a copy of the talk"),
            "/go": _Action(call=self._go, argument="NAME", says="go on in another copy"),
            "/help": _Action(call=self._help, argument="", says="this list"),
            "/quit": _Action(call=self._quit, argument="", says="end"),
        }

    @property
    def conversation(self) -> Conversation:
        """The branch that speaks."""
        return self.branches[self.name]

    def run(self) -> None:
        """Talk until /quit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, where the system has them

        self._console.show("A conversation; /help lists what can be done with it, /quit ends it.")
        while not self.ended:
            try:
                text = input("you> ").strip()
            except EOFError:
                print()
                return
            if text:
                self.hear(text)

    def hear(self, text: str) -> None:
        """Do what a line asks for; a mistake is said and changes nothing."""
        try:
            if not text.startswith("/"):
                self._answer(text)
                return
            word, _, argument = text.partition(" ")
            action = self._actions.get(word)
            if action is None or bool(action.argument) != bool(argument.strip()):
                self._help()
            else:
                action.call(argument.strip())
        except (NewLLMError, OSError) as error:
            self._console.show(str(error))

    def _answer(self, text: str) -> None:
        pieces = self.conversation.reply(text)
        self._console.write("bot> ")
        begun = time.perf_counter()
        try:
            for piece in pieces:
                self._console.write(printable(piece))
        except KeyboardInterrupt:
            self._console.show("\n(interrupted: this turn was not said)")
            return
        seconds = time.perf_counter() - begun
        self._console.show("")
        self._console.aside(self._settled(seconds))

    def _settled(self, seconds: float) -> str:
        """Return how hard the context was to settle in the last turn."""
        talk = self.conversation
        assert talk.last is not None
        drawn = talk.last.num_drawn
        parts = [self.name, f"turn {talk.num_turns}", f"{drawn} tokens"]
        if seconds > 0:
            parts[-1] += f", {drawn / seconds:,.0f} a second"
        seen = view(talk)
        if seen is not None:
            of_turn = seen.num_sweeps[-len(talk.last.ids) :]
            settled = f"settled in {int(of_turn.max())} sweeps"
            if int(of_turn.max()) > len(seen.residuals):
                settled = f"not settled in {len(seen.residuals)} sweeps"
            parts += [settled, f"last token moved it by {seen.moves[-1].item():.1%}"]
        return " · ".join(parts)

    def _reset(self, _: str) -> None:
        self.conversation.reset()

    def _save(self, place: str) -> None:
        self.conversation.save(Path(place))

    def _load(self, place: str) -> None:
        self.conversation.load(Path(place))

    def _fork(self, name: str) -> None:
        if name in self.branches:
            self._console.show(
                f"a new name expected, there is a branch {name}; /go {name} enters it"
            )
            return
        self.branches[name] = self.conversation.fork()
        self._console.aside(f"{name}, a copy of {self.name}; /go {self.name} returns to it")
        self.name = name

    def _go(self, name: str) -> None:
        if name not in self.branches:
            self._console.show(f"one of {', '.join(self.branches)} expected, got {name}")
            return
        here, there = self.conversation.context, self.branches[name].context
        self.name = name
        apart = ""
        if here is not None and there is not None:
            apart = f"; its context is {distance(here, there):.0%} away"
        self._console.aside(f"{name}, turn {self.conversation.num_turns}{apart}")

    def _help(self, _: str = "") -> None:
        names = [f"{word} {action.argument}".strip() for word, action in self._actions.items()]
        self._console.show("commands: " + ", ".join(names))
        for name, action in zip(names, self._actions.values(), strict=True):
            self._console.aside(f"  {name:12} {action.says}")

    def _quit(self, _: str) -> None:
        self.ended = True
