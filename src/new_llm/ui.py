"""A page to talk at, and to watch the context while it talks; over Gradio.

On one side the talk, and a second one that was forked from it; on the other what their contexts do:
how they settle, where they went, how long their gates remember, and what they would say had they
forgotten. The page asks nothing of any other machine.
"""

import html
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr
import gradio.themes
import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .config import SampleConfig
from .console import printable
from .doctor import THRESHOLDS
from .errors import NewLLMError
from .generate import Conversation
from .plots import COLOURS, inline_axes
from .view import View, distance, forgetful, planar, view

# seconds after which a page that nobody looks at is forgotten, and texts that are told at once
_FORGOTTEN, _AT_ONCE = 3600, 4
# fixed points of tokens that a map shows behind a talk
_CLOUD = 400
# tokens of a talk whose residuals are shown
_SHOWN = 160
_NAMES = ("A", "B")
_BOTH = "both"
_CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#seen svg {width: 100%; height: auto; max-width: 34rem}
#seen h3 {margin: 0.8rem 0 0.1rem}
#seen p {margin: 0 0 0.4rem; opacity: 0.8}
#seen table {border-collapse: collapse; width: 100%}
#seen td, #seen th {text-align: left; padding: 0.15rem 0.6rem 0.15rem 0; vertical-align: top;
  border: none !important}
#seen code {white-space: pre-wrap; overflow-wrap: anywhere}
#seen .scroll {overflow-x: auto}
"""
_numbers = itertools.count()


@dataclass
class _Talk:
    """One talk of a page, and what was said in it."""

    conversation: Conversation
    said: list[Any] = field(default_factory=list)


@dataclass
class _Page:
    """What one reader of the page has: a talk, and perhaps its fork."""

    talks: list[_Talk]
    latest: int = 0
    """Which one was spoken to last."""

    def spoken_to(self, whom: str) -> list[_Talk]:
        if whom == _BOTH:
            return self.talks
        return [self.talks[min(_NAMES.index(whom), len(self.talks) - 1)]]

    def said(self) -> tuple[list[Any], list[Any]]:
        return self.talks[0].said, self.talks[1].said if len(self.talks) > 1 else []


class Page:
    """The page of a checkpoint.

    Args:
        checkpoint: whose model speaks; sequence scope shows its context too.
        config: how tokens are drawn, until a reader turns a knob.
        name: of the model.
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig, name: str) -> None:
        self.checkpoint, self.config, self.name = checkpoint, config, name
        self.cloud = _cloud(checkpoint)

    def blocks(self) -> gr.Blocks:
        """Return the page, ready to be launched."""
        with gr.Blocks(title=f"New-LLM: {self.name}", analytics_enabled=False) as blocks:
            state: Any = gr.State(None, time_to_live=_FORGOTTEN)
            gr.Markdown(
                f"## {self.name}\nIts whole memory of this talk is one context of "
                f"{self._size()} numbers. Fork it, and both go on from the same memory."
            )
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    first = self._chatbot("A")
                    second = self._chatbot("B, forked from A", visible=False)
                    text = gr.Textbox(placeholder="Say something", show_label=False, lines=1,
                                      max_lines=4, elem_id="say", submit_btn=True)  # fmt: skip
                    whom = gr.Radio([*_NAMES, _BOTH], value="A", label="to", visible=False,
                                    elem_id="whom")  # fmt: skip
                    with gr.Row():
                        fork = gr.Button("Fork", elem_id="fork", min_width=80)
                        reset = gr.Button("Reset", elem_id="reset", min_width=80)
                    with gr.Accordion("How tokens are drawn", open=False):
                        hottest = max(2.0, self.config.temperature)
                        temperature = gr.Slider(0.0, hottest, self.config.temperature,
                                                step=0.05, label="temperature")  # fmt: skip
                        longest = max(400, self.config.max_new_tokens)
                        tokens = gr.Slider(1, longest, self.config.max_new_tokens, step=1,
                                           label="most tokens of an answer")  # fmt: skip
                with gr.Column(scale=6, min_width=320):
                    seen = gr.HTML(_NOTHING, elem_id="seen")
            shown = [state, first, second, whom, seen]
            saying = text.submit(
                self._say, [state, text, whom, temperature, tokens], [text, *shown],
                concurrency_limit=_AT_ONCE, show_progress="hidden",
            )  # fmt: skip
            fork.click(self._fork, [state], shown, show_progress="hidden")
            # the bin of a talk forgets too: a talk that only looks empty would mislead
            for forgets in (reset.click, first.clear, second.clear):
                forgets(self._reset, None, shown, show_progress="hidden", cancels=[saying])
        return blocks

    def launch(self, *, host: str, port: int | None) -> tuple[gr.Blocks, str]:
        """Serve the page in threads, at a free port or at `port`; return it and its address.

        Raises:
            OSError: the address is taken.
        """
        blocks = self.blocks()
        # the fonts of the reader's machine: the page asks nothing of others
        fonts = ["system-ui", "sans-serif"]
        theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, quiet=True, share=False, prevent_thread_lock=True,
            theme=theme, css=_CSS, footer_links=[], show_error=True, ssr_mode=False,
            run_history=False,
        )  # fmt: skip
        return blocks, url

    def _size(self) -> str:
        config = self.checkpoint.model.config
        return f"{config.num_blocks} x {config.context_width}"

    def _chatbot(self, label: str, *, visible: bool = True) -> gr.Chatbot:
        return gr.Chatbot(
            label=label, height=360, visible=visible, render_markdown=False, elem_id=label[0],
            feedback_options=None, allow_tags=False, buttons=["copy"],
        )  # fmt: skip

    def _begin(self) -> _Page:
        return _Page(talks=[_Talk(conversation=Conversation(self.checkpoint, self.config))])

    def _shown(self, page: _Page, *, whom: str | None = None, looked: bool = True) -> list[Any]:
        """Return what state, both talks, whom and what is seen are set to."""
        forked = len(page.talks) > 1
        first, second = page.said()
        chosen = gr.Radio(visible=forked) if whom is None else gr.Radio(visible=forked, value=whom)
        seen = self._seen(page) if looked else gr.skip()
        return [page, first, gr.Chatbot(value=second, visible=forked), chosen, seen]

    def _say(
        self, page: _Page | None, text: str, whom: str, temperature: float, tokens: float
    ) -> Iterator[list[Any]]:
        page = page or self._begin()
        if not text.strip():
            yield ["", *self._shown(page, looked=False)]
            return
        config = replace(self.config, max_new_tokens=int(tokens), temperature=temperature)
        for talk in page.spoken_to(whom):
            page.latest = page.talks.index(talk)
            talk.conversation.config = config
            # the talk is drawn as HTML: a picture in it would be asked for elsewhere
            talk.said.append({"role": "user", "content": html.escape(text)})
            answer = {"role": "assistant", "content": ""}
            talk.said.append(answer)
            try:
                for piece in talk.conversation.reply(text):
                    answer["content"] += html.escape(printable(piece))
                    if piece:
                        yield ["", *self._shown(page, looked=False)]
            except NewLLMError as error:
                answer["content"] = html.escape(f"({error})")
        yield ["", *self._shown(page)]

    def _fork(self, page: _Page | None) -> list[Any]:
        page = page or self._begin()
        origin = page.talks[0]
        said = [dict(message) for message in origin.said]
        page.latest = 1
        page.talks[1:] = [_Talk(conversation=origin.conversation.fork(), said=said)]
        return self._shown(page, whom="B")

    def _reset(self) -> list[Any]:
        return self._shown(self._begin(), whom="A")

    def _seen(self, page: _Page) -> str:
        """Return what is seen of the contexts, as HTML."""
        views = [view(talk.conversation) for talk in page.talks]
        known = [one for one in views if one is not None]
        if not known:
            return _NOTHING
        last = views[page.latest] or known[0]
        parts = [
            _told(page, last),
            _section("Where the context went", _MAP, _map(self.cloud, known)),
            _section("How each token settled", _RESIDUALS, _residuals(last)),
            _section("How long its gates remember", _SCALES, _scales(last)),
            _section("Had it forgotten", _FORGETS, _forgets(page)),
        ]
        return "".join(parts)


_NOTHING = "<p>What the context does is shown here, once something was said.</p>"
_MAP = (
    "Contexts after each token of the talk, and grey, where single tokens settle on their own; on "
    "the two directions in which these differ most."
)
_RESIDUALS = (
    "All tokens solved at once: relative change of each token's context in each sweep. Light is at "
    f"rest, {THRESHOLDS.residual:g} and less."
)
_SCALES = "Tokens after which a gate keeps 1/e of what it held, at the last token; all units."
_FORGETS = "The likeliest beginnings of the next answer, were the context zeroed so far back."


def _section(title: str, caption: str, body: str) -> str:
    return f"<h3>{title}</h3><p>{caption}</p>{body}"


def _told(page: _Page, seen: View) -> str:
    """Return in words how settled the contexts are, and how far apart."""
    most = int(seen.num_sweeps.max())
    settled = f"settled in {most} sweeps"
    if most > len(seen.residuals):
        settled = f"not settled in {len(seen.residuals)} sweeps"
    text = f"{len(seen.tokens)} tokens, {settled}; the last one moved the context by "
    text += f"{seen.moves[-1].item():.1%}."
    contexts = [talk.conversation.context for talk in page.talks]
    if len(contexts) > 1 and contexts[0] is not None and contexts[1] is not None:
        text += f" A and B are {distance(contexts[0], contexts[1]):.0%} apart."
    return f'<p id="settled">{text}</p>'


@torch.no_grad()
def _cloud(checkpoint: Checkpoint) -> Tensor:
    """Return the fixed points of tokens from all of the vocabulary, `[N, K * C]`."""
    model = checkpoint.model
    count = min(_CLOUD, model.vocab_size)
    ids = torch.linspace(0, model.vocab_size - 1, count).long().to(model.embedding.weight.device)
    return model.search(ids).contexts.flatten(1).cpu()


def _map(cloud: Tensor, views: list[View]) -> str:
    paths = [seen.contexts.flatten(1).cpu() for seen in views]
    flat = planar(torch.cat([cloud, *paths])).numpy()
    ends = np.cumsum([len(cloud), *map(len, paths)])
    with inline_axes(f"map{next(_numbers)}") as (axes, svg):
        axes.scatter(*flat[: ends[0]].T, s=5, color="#8a8a8a", alpha=0.45, linewidths=0)
        for name, begin, end, colour in zip(_NAMES, ends, ends[1:], COLOURS, strict=False):
            axes.plot(*flat[begin:end].T, color=colour, alpha=0.55, linewidth=1.0)
            axes.scatter(*flat[end - 1 : end].T, s=45, color=colour, zorder=3, label=name)
        if len(views) > 1:
            axes.legend(frameon=False)
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.spines[["top", "right"]].set_visible(False)
        return svg()


def _residuals(seen: View) -> str:
    shown = seen.residuals[:, -_SHOWN:].cpu().clamp(min=1e-9).log10().numpy()
    with inline_axes(f"residuals{next(_numbers)}") as (axes, svg):
        floor = float(np.log10(THRESHOLDS.residual))
        picture = axes.imshow(
            shown, aspect="auto", cmap="YlGnBu", vmin=floor, vmax=0.0, interpolation="nearest"
        )
        axes.figure.colorbar(picture, ax=axes, label="log10 of the change")
        axes.set_yticks(range(len(shown)), [str(n + 1) for n in range(len(shown))])
        axes.set_xlabel("token")
        axes.set_ylabel("sweep")
        return svg()


def _scales(seen: View) -> str:
    scales = seen.time_scales.cpu().clamp(min=0.1, max=1e5).numpy()
    edges = np.geomspace(0.1, max(200.0, float(scales.max()) * 1.01), 40)
    with inline_axes(f"scales{next(_numbers)}") as (axes, svg):
        for k, block in enumerate(scales):
            axes.hist(block, bins=edges, color=COLOURS[k % len(COLOURS)], alpha=0.6,
                      label=f"block {k + 1}")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("units")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return svg()


def _forgets(page: _Page) -> str:
    """Return a table: how far back the context is zeroed, and what would be said."""
    rows: list[str] = []
    for name, talk in zip(_NAMES, page.talks, strict=False):
        if not talk.conversation.recent:
            continue
        for back, said in forgetful(talk.conversation):
            where = "not at all" if back is None else f"{back} back"
            who = f"<td>{name}</td>" if len(page.talks) > 1 else ""
            likely = " &nbsp; ".join(
                f"<code>{html.escape(repr(printable(token))[1:-1])}</code>&nbsp;{share:.0%}"
                for token, share in said
            )
            rows.append(f"<tr>{who}<td>{where}</td><td>{likely}</td></tr>")
    who = "<th>talk</th>" if len(page.talks) > 1 else ""
    heads = f"<tr>{who}<th>zeroed</th><th>it would begin with</th></tr>"
    return f'<div class="scroll"><table>{heads}{"".join(rows)}</table></div>'
