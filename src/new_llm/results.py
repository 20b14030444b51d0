"""Tables of benchmarks as Markdown, each with the command that makes it again, and a figure."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .console import format_cell
from .errors import ConfigError
from .files import read_sealed, write_sealed, write_text

Result = dict[str, Any]
# of a result that is kept
FORMAT_VERSION = 2

# what stands above it on a page is the reader's guide, and is kept
MARK = "<!-- below: written by the commands that stand there -->"

# what a table holds, where its name does not say it
CAPTIONS = {
    "quality, tuning": "Nats a token on the held-out mix by learning rate and, for models whose "
    "own matrices grow with the square of what they carry, by its width (of Mamba: numbers a "
    "channel), the MLPs filling up to as many parameters; at full width they leave the LSTM none. "
    "The best of each model is kept for the tables after it. It is chosen on the dialogues that "
    "are reported.",
    "quality, tokens": "Equal parameters, equal tokens. Nats a token on held-out dialogues: all "
    "of them (`mix`), each part apart, and what the assistant says alone. `spread` is the standard "
    "deviation over random seeds of `mix`. Attention reaches 512 tokens. Contexts and its window "
    "are carried from segment to segment of 128.",
    "quality, time": "The same, each model trained for as many steps as fit in the time of ours, "
    "Phase 1 included; a step is timed in turns, on one thread, with MLPs of the nearest multiple "
    "of 16, which processors like better than what equal parameters come to.",
    "quality, leads": "How far a model is above ours, nats a token: means of seed by seed, their "
    "standard deviation, and the 95 % interval of the mean as whole dialogues are drawn anew.",
    "quality, memory": "What all that was said is worth beyond a context rebuilt from the last "
    "tokens, nats a token, in the 40 longest held-out dialogues of a part; paired, 95 % interval "
    "as whole dialogues are drawn anew. Seed 0.",
    "ablations, phases": "The default with one thing changed. Verdicts: token / sequence scope. "
    "Seconds and speeds are medians on one thread beside other trainings: a guide, no more.",
    "ablations, coupling": "The limit on the coupling q2; at 0 the recurrence is linear.",
    "ablations, activation": "The default, whose cell has ELU, with another activation; the limit "
    "on q2 counts its steepest slope.",
    "ablations, coupling without Phase 1": "The same, and nothing else that holds contraction.",
    "ablations, recipe": "Ours and peers of as many parameters, by the optimiser of the comparison "
    "(Muon) and by AdamW; an LSTM's gates begin at time-scales as ours do, unless said.",
    "long, losses": "The default on all cores; nats a token on held-out dialogues, counts on the "
    "same training tokens.",
    "long, memory": "As above, of this model.",
    "tasks, forgetting": "Two texts that differ in their first token alone, whose right answers "
    "differ for ever: how far their contexts are apart once so many tokens have been read, as a "
    "share of what it was after the first; medians over 128 pairs, then over seeds. `left until` "
    "is the last of these lengths at which a hundredth is left, seed by seed. The trainings are "
    "those of the tables above, made again.",
    "tasks": "The longest distance up to which nine in ten answers are right, seed by seed, and "
    "the mean shares of right answers: a column of 16 is of distances from 13 to 16, one of 32 "
    "from 25, and so on; of copy of that distance alone. "
    "Texts train on distances up to 64, in `steps` of 32 texts. "
    "Another seed, on other texts and at all distances, chose "
    "the learning rate and how gates begin: at `time-scales` of up to so many tokens, or as is "
    "usual for a peer. All have as many parameters, the MLPs what a recurrence leaves of "
    "them, W_c = 0 those beside that it leaves idle; `carried` are the numbers that go from "
    "position to position, of attention all that was read, "
    "at rotary positions far beyond those that it trained on. Phase 2 alone: no fixed point is "
    "judged. `q2` is the largest of any block and seed, `standard error` the largest of any seed "
    "and distance, over texts; `chance` is what guessing gets.",
}


def tables(name: str, result: Result) -> Iterator[tuple[str, list[str], list[list[object]]]]:
    """Yield title, columns and cells of the tables of a benchmark's rows."""
    about = f"{result['threads']} threads"
    for table in dict.fromkeys(row.get("table") for row in result["rows"]):
        rows = [row for row in result["rows"] if row.get("table") == table]
        hidden = ("why", "table", "by past")
        columns = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
        title = f"{name}, {about}" if table is None else f"{name}, {table}"
        yield title, columns, [[format_cell(row.get(key)) for key in columns] for row in rows]


def markdown(results: dict[str, Result], figure: str | None = None) -> str:
    """Return the tables of several benchmarks, and the address of a figure.

    >>> rows = [{"model": "gru", "mix": 3.5}]
    >>> page = markdown({"quality": {"rows": rows, "threads": 1, "versions": {"torch": "2"},
    ...                              "device": "cpu", "command": "new-llm bench quality"}})
    >>> print(page)
    ## quality
    `new-llm bench quality`
    <BLANKLINE>
    ### quality, 1 threads
    <BLANKLINE>
    | model | mix |
    | --- | --- |
    | gru | 3.5 |
    <BLANKLINE>
    torch 2; cpu.
    <BLANKLINE>
    """
    parts = []
    for name, result in results.items():
        parts.append(f"## {name}\n`{result['command']}`\n")
        for title, columns, cells in tables(name, result):
            lines = [columns, ["---"] * len(columns), *cells]
            table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
            caption = CAPTIONS.get(title, CAPTIONS.get(name, ""))
            parts.append(f"### {title}\n{caption}\n\n{table}\n".replace("\n\n\n", "\n\n"))
        # where models were trained, their rows name its version
        named = any(row.get("trained on") for row in result["rows"])
        shown = {k: v for k, v in result["versions"].items() if k != "torch" or not named}
        versions = ", ".join(f"{k} {v}" for k, v in shown.items())
        parts.append(f"{versions}; {result['device']}.\n")
    if figure is not None:
        parts.append(f"![gain of the past by tokens before]({figure})\n")
    return "\n".join(parts)


def require_page(page: Path) -> None:
    """Check that a page can be written to, before hours of work.

    Raises:
        ConfigError: what lies there is no text.
    """
    try:
        if page.is_file():
            page.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"a page in UTF-8 expected, {page} holds something else; give another --page"
        ) from None


def write_page(page: Path, results: dict[str, Result]) -> None:
    """Write the tables of benchmarks to a page, below its `MARK`, and their figure beside it."""
    memory = [
        row | {"bench": name}
        for name, result in results.items()
        for row in result["rows"]
        if row.get("table") == "memory" and row["by past"]
    ]
    figure = None
    if memory:
        figure = page.with_name(page.stem + "-memory.svg")
        write_text(figure, _memory_figure(memory))
    made = markdown(results, None if figure is None else figure.name)
    written = page.read_text(encoding="utf-8") if page.exists() else ""
    # what a person wrote above the mark stays
    reading = written.partition(MARK)[0] if MARK in written else "# Results\n\n"
    write_text(page, f"{reading}{MARK}\n{made}")


def finished(folder: Path, names: tuple[str, ...]) -> dict[str, Result]:
    """Return the kept results of a folder, by the benchmark's name."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: read_kept(path) for name, path in paths.items() if path.exists()}


def read_kept(path: Path) -> Result:
    """Read the kept result of a benchmark.

    Raises:
        CheckpointError: it is damaged or changed.
    """
    return read_sealed(
        path,
        "the result of a benchmark",
        version=FORMAT_VERSION,
        remedy="delete it to measure again",
    )


def write_kept(path: Path, result: Result) -> None:
    """Keep the result of a benchmark, with its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, result, version=FORMAT_VERSION)


def _memory_figure(rows: list[Result]) -> str:
    """Return the gain of the whole past over a rebuilt context, against the tokens before."""
    from .plots import COLOURS, alone

    reaches = sorted({row["tokens kept"] for row in rows})
    models = [*dict.fromkeys((row["bench"], row["model"]) for row in rows)]
    parts = [*dict.fromkeys(row["part"] for row in rows)]

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(parts), len(reaches), sharey="col", squeeze=False)
        places = itertools.product(parts, reaches)
        for axes, (part, reach) in zip(all_axes.flat, places, strict=True):
            for row in rows:
                if (row["part"], row["tokens kept"]) != (part, reach):
                    continue
                past = sorted((int(at), gain) for at, gain in row["by past"].items())
                place = models.index((row["bench"], row["model"]))
                long = row["bench"] != "quality"
                name = f"{row['model']} (long)" if long else row["model"]
                axes.plot(*zip(*past, strict=True), color=COLOURS[place % len(COLOURS)],
                          ls="--" if long else "-", label=name, marker="o", ms=2)  # fmt: skip
            axes.axhline(0.0, color="black", lw=0.5)
            axes.set_title(f"{part}, against the last {reach}", fontsize=9)
            axes.set_xscale("log", base=2)
        for axes in all_axes[-1]:
            axes.set_xlabel("tokens before, at least")
        for axes in all_axes[:, 0]:
            axes.set_ylabel("gain, nats a token")
        named = all_axes[0, 0].get_legend_handles_labels()
        figure.legend(*named, loc="outside lower center", ncols=len(models), frameon=False)

    return alone(draw, inches=(3.2 * len(reaches), 3.0 * len(parts)))
