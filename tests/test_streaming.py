"""Preparing data as a stream: one pass, killed anywhere, in flat memory."""

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from new_llm import dialogues, preparation, store
from new_llm.config import DataConfig
from new_llm.data import prepare
from new_llm.dialogues import DialogueReader, Messages, Position, read_dialogues
from new_llm.errors import CheckpointError, DataError, DiskFullError, LostSourceError
from new_llm.preparation import dialogue_hash
from new_llm.store import StoreWriter, TokenStore, write_store
from new_llm.tokenizer import ChatTokenizer

READ: dict[str, Any] = {"split": "train", "on_bad_row": "skip", "max_dialogues": None}


def chats(first: int, last: int) -> list[Messages]:
    """Return dialogues that differ, some of more messages, some not of ASCII."""
    return [
        [
            {"role": "system", "content": "be kind"},
            *(
                {"role": ("user", "assistant")[turn % 2], "content": f"day {day}, café {turn} 😀"}
                for turn in range(2 + day % 3)
            ),
        ][day % 2 :]
        for day in range(first, last)
    ]


def packed(rows: list[Messages]) -> bytes:
    return b"".join(json.dumps({"messages": m}).encode() + b"\n" for m in rows)


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": bytes,
    "jsonl.gz": gzip.compress,
    "jsonl.zst": zstd,
    "jsonl.bz2": bz2.compress,
    "jsonl.xz": lzma.compress,
}


def write_parquet(path: Path, rows: list[Messages], group: int) -> None:
    table = pyarrow.Table.from_pylist([{"messages": m} for m in rows])
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def write_forms(folder: Path) -> Path:
    """Write 60 dialogues in each form, bad, short and blank lines among them, in one folder."""
    folder.mkdir()
    for place, (form, compress) in enumerate(FORMS.items()):
        rows = chats(60 * place, 60 * place + 60)
        lines = packed(rows[:30]) + b'\n{"bad": 1}\n' + packed([rows[0][:1]]) + packed(rows[30:])
        (folder / f"{place}.{form}").write_bytes(compress(lines + b"[]\n"))
    write_parquet(folder / "9.parquet", chats(300, 360), 25)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def settings_of(source: Path | str, **options: Any) -> DataConfig:
    config = DataConfig(
        source=str(source), vocab_size=320, sequence_length=8, valid_fraction=0.3, on_bad_row="skip"
    )
    return replace(config, **options)


def naive(rows: list[Messages], tokenizer: ChatTokenizer) -> dict[str, bytes]:
    """Encode one message after another; return the bytes of a store's files."""
    ids: list[int] = []
    said: list[bool] = []
    offsets, sizes = [0], []
    newline = tokenizer.encode("\n")
    for messages in rows:
        for message in messages:
            header = [tokenizer.im_start_id, *tokenizer.encode(message["role"] + "\n")]
            content = [*tokenizer.encode(message["content"]), tokenizer.im_end_id]
            ids += header + content + newline
            said += [False] * len(header)
            said += [message["role"] == "assistant"] * len(content) + [False] * len(newline)
        offsets.append(len(ids))
        sizes.append(sum(len(message["content"].encode()) for message in messages))
    return {
        "tokens.bin": np.array(ids, dtype="<i4").tobytes(),
        "assistant.bin": np.array(said, dtype=bool).tobytes(),
        "offsets.bin": np.array(offsets, dtype="<i8").tobytes(),
        "num_content_bytes.bin": np.array(sizes, dtype="<i8").tobytes(),
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of seven dialogues, and a save behind each."""
    monkeypatch.setattr(store, "_BATCH", 7)
    monkeypatch.setattr(preparation, "_SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("apart", [False, True])
def test_one_pass_writes_what_a_plain_loop_gives(tmp_path: Path, apart: bool) -> None:
    source = write_forms(tmp_path / "forms")
    (tmp_path / "valid.jsonl").write_bytes(packed(chats(40, 100)))
    config = settings_of(source, valid=str(tmp_path / "valid.jsonl") if apart else None)
    prepared = prepare(config, tmp_path / "out")
    everything = chats(0, 360)
    if apart:
        valid = chats(40, 100)
        train = [m for m in everything if m not in valid]
    else:
        first = [int.from_bytes(dialogue_hash(m)[:8], "big") / 2.0**64 for m in everything]
        valid = [m for m, share in zip(everything, first, strict=True) if share < 0.3]
        train = [m for m in everything if m not in valid]
    assert len(valid) > 50 and len(train) > 200
    for name, rows in (("train", train), ("valid", valid)):
        found = {path.name: path.read_bytes() for path in (tmp_path / "out" / name).glob("*.bin")}
        assert found == naive(rows, prepared.tokenizer)
    bad, short = 2 * len(FORMS), len(FORMS)
    report = prepared.report
    assert (report["num_rows"], report["num_bad_rows"]) == (360 + bad + short, bad)
    assert report["num_short"] == short
    assert report["num_train_dialogues"] == len(train)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"train", "valid", "tokenizer", "prepared.json"}


def test_the_hash_of_a_dialogue_is_that_of_kept_results() -> None:
    text = 'a "quote", a \\, \n\t\x00\x1f\x7f, é \u2028 😀'
    found = dialogue_hash([{"role": "user", "content": text}, {"content": "b", "role": "x"}])
    written = json.dumps(
        [{"content": text, "role": "user"}, {"content": "b", "role": "x"}],
        ensure_ascii=False,
        separators=(",", ":"),
    )
    assert found == sha256(written.encode()).digest()


class Killed(BaseException):
    """Stands for what no code catches."""


def stop_after(count: int) -> Callable[[str, int], None]:
    left = [count]

    def progress(what: str, number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return progress


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("apart", [False, True])
def test_stopped_anywhere_the_same_bytes_come_out(tmp_path: Path, apart: bool) -> None:
    source = write_forms(tmp_path / "forms")
    (tmp_path / "valid.jsonl").write_bytes(packed(chats(40, 100)))
    config = settings_of(source, valid=str(tmp_path / "valid.jsonl") if apart else None)
    whole = prepare(config, tmp_path / "whole")
    draw = random.Random(0)
    for trial in range(2):
        out, stops = tmp_path / f"{trial}", 0
        while not (out / "prepared.json").exists():
            try:
                found = prepare(config, out, progress=stop_after(draw.randrange(1, 20)))
                assert found.report == whole.report
            except Killed:
                stops += 1
                # what a kill leaves behind the last save
                for path in out.rglob("*.bin"):
                    with path.open("ab") as file:
                        file.write(b"rubbish")
        assert stops >= 3
        assert tree(out) == tree(tmp_path / "whole")
        shutil.rmtree(out)


@pytest.mark.usefixtures("tiny")
def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_forms(tmp_path / "forms")
    with pytest.raises(Killed):
        prepare(settings_of(source), tmp_path / "out", progress=stop_after(20))
    told: list[int] = []
    parsed = [0]
    check = dialogues.check_dialogue

    def counting(row: Any, place: str) -> Messages:
        parsed[0] += 1
        return check(row, place)

    monkeypatch.setattr(dialogues, "check_dialogue", counting)
    monkeypatch.setattr(ChatTokenizer, "train", pytest.fail)
    prepare(settings_of(source), tmp_path / "out", progress=lambda what, count: told.append(count))
    # twenty batches were saved: two files of 63 rows each, and 20 rows of the third
    assert sum(told) == 360 - 140
    assert parsed[0] == 60 * 6 + 3 * len(FORMS) - 2 * 63 - 20


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("stage", range(5))
def test_stopped_while_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(packed(chats(0, 40)))
    config, out = settings_of(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare(config, tmp_path / "whole")
    calls = [stage]
    rename, discard = Path.rename, preparation.discard

    def dying(self: Path, target: Path) -> Path:
        calls[0] -= 1
        if calls[0] < 0:
            raise Killed
        return rename(self, target)

    def never(folder: Path) -> None:
        if (folder / "prepared.json").exists():
            raise Killed
        discard(folder)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dying)
        patch.setattr(preparation, "discard", never)
        prepare(config, out)
    assert (out / ".preparing").exists()
    monkeypatch.setattr(StoreWriter, "append", pytest.fail)
    prepare(config, out)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("change", ["size", "time", "config", "position", "cut", "vocabulary"])
def test_a_position_of_something_else_begins_again(tmp_path: Path, change: str) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(packed(chats(0, 60)))
    config = settings_of(source)
    with pytest.raises(Killed):
        prepare(config, out, progress=stop_after(4))
    position = out / ".preparing" / "position.json"
    if change == "size":
        source.write_bytes(packed(chats(50, 100)))
    elif change == "time":
        source.write_bytes(packed(chats(0, 60)).replace(b"day 1", b"day 7"))
        os.utime(source, ns=(1, 1))
    elif change == "config":
        config = replace(config, valid_fraction=0.5)
    elif change == "position":
        text = position.read_text()
        assert '"num_rows": 28' in text
        position.write_text(text.replace('"num_rows": 28', '"num_rows": 29'))
    elif change == "cut":
        (out / ".preparing" / "train" / "tokens.bin").write_bytes(b"1234")
    else:
        (out / ".preparing" / "tokenizer" / "tokenizer.json").write_text("{}")
    told: list[int] = []
    prepare(config, out, progress=lambda what, count: told.append(count))
    prepare(config, tmp_path / "whole")
    assert sum(told) == (50 if change == "size" else 60)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_hashes_of_held_out_dialogues_that_are_gone_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(packed(chats(0, 60)))
    (tmp_path / "valid.jsonl").write_bytes(packed(chats(40, 60)))
    config, out = settings_of(tmp_path / "a.jsonl", valid=str(tmp_path / "valid.jsonl")), "out"
    with pytest.raises(Killed):
        prepare(config, tmp_path / out, progress=stop_after(7))
    digests = tmp_path / out / ".preparing" / "digests.bin"
    assert digests.stat().st_size == 20 * 32
    digests.write_bytes(digests.read_bytes()[:-40])
    found = prepare(config, tmp_path / out)
    assert (found.train.num_dialogues, found.valid.num_dialogues) == (40, 20)


def test_dialogues_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(packed(chats(0, 60)))

    def meddle(what: str, count: int) -> None:
        source.write_bytes(packed(chats(0, 61)))

    with pytest.raises(DataError, match=r"stay as they are .*a\.jsonl changed; run the same"):
        prepare(settings_of(source), tmp_path / "out", progress=meddle)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("tiny")
def test_a_bad_row_leaves_nothing_and_a_full_disk_leaves_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(packed(chats(0, 60)) + b"[]\n")
    with pytest.raises(DataError, match="line 61"):
        prepare(settings_of(source, on_bad_row="error", tokenizer="gpt2"), out)
    assert not list(out.iterdir())
    append, calls = StoreWriter.append, [9]

    def full(self: StoreWriter, encoded: Any) -> None:
        calls[0] -= 1
        if calls[0] == 0:
            raise OSError(28, "No space left on device")
        append(self, encoded)

    monkeypatch.setattr(StoreWriter, "append", full)
    with pytest.raises(DiskFullError, match="free some space and run the same command again"):
        prepare(settings_of(source), out)
    told: list[int] = []
    prepare(settings_of(source), out, progress=lambda what, count: told.append(count))
    assert 0 < sum(told) < 60
    prepare(settings_of(source), tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from new_llm import preparation, store
from new_llm.config import DataConfig, from_dict
from new_llm.data import prepare
import json
store._BATCH, preparation._SAVE_SECONDS = 7, 0.0
config = from_dict(DataConfig, json.loads(sys.argv[1]))
prepare(config, Path(sys.argv[2]), progress=lambda *told: print(*told, flush=True))
"""


def test_killed_by_the_system_the_same_bytes_come_out(tmp_path: Path) -> None:
    source = write_forms(tmp_path / "forms")
    config, out = settings_of(source), tmp_path / "out"
    prepare(config, tmp_path / "whole")
    draw = random.Random(1)
    values = json.dumps(vars(config))
    command = [sys.executable, "-c", KILLED, values, str(out)]
    for lines in (1, draw.randrange(4, 12), draw.randrange(4, 12)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for _ in range(lines):
                assert run.stdout.readline()
            time.sleep(draw.random() / 50)
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        assert not (out / "prepared.json").exists()
    told: list[int] = []
    prepare(config, out, progress=lambda what, count: told.append(count))
    assert 0 < sum(told) < 360 - 7 * 4
    assert tree(out) == tree(tmp_path / "whole")


@settings(max_examples=40, deadline=None)
@given(stops=st.lists(st.integers(0, 150), max_size=4), limit=st.none() | st.integers(1, 400))
@example(stops=[310, 7, 20], limit=None)
def test_reading_from_any_position_is_reading_on(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], limit: int | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        write_forms(folder)
    options: dict[str, Any] = READ | {"max_dialogues": limit}
    plain = DialogueReader(str(folder), **options)
    wanted = list(plain)
    found: list[Messages] = []
    position = Position()
    for stop in stops:
        reader = DialogueReader(str(folder), **options, start=position)
        found += islice(reader, stop)
        kept = position
        position = reader.position()
        assert DialogueReader(str(folder), **options, start=kept).position() == kept
    last = DialogueReader(str(folder), **options, start=position)
    found += list(last)
    assert found == wanted
    assert last.position() == plain.position()


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_hub_goes_on_where_its_client_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    files = []
    for shard in range(3):
        files.append(str(tmp_path / f"{shard}.{form}"))
        rows = chats(20 * shard, 20 * shard + 20)
        if form == "json":
            Path(files[-1]).write_bytes(packed(rows))
        else:
            write_parquet(Path(files[-1]), rows, 6)
    load = datasets.load_dataset

    def local(name: str, split: str, revision: str | None, streaming: bool) -> Any:
        return load(form, data_files=files, split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    reader = DialogueReader("somebody/chats", **READ)
    taken = iter(reader)
    found = [next(taken) for _ in range(27)]
    kept = json.loads(json.dumps(vars(reader.position()) | {"report": None}))
    assert kept["hub"] is not None and kept["row"] == 27
    position = Position(**(kept | {"report": reader.position().report}))
    again = DialogueReader("somebody/chats", **READ, start=position)
    assert found + list(again) == list(DialogueReader("somebody/chats", **READ)) == chats(0, 60)
    assert again.position().report.num_rows == 60


@pytest.mark.usefixtures("tiny")
def test_the_hub_and_the_default_package_are_prepared_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_bytes(packed(chats(0, 60)))
    load = datasets.load_dataset

    def local(name: str, split: str, revision: str | None, streaming: bool) -> Any:
        files = str(tmp_path / "rows.json")
        return load("json", data_files=files, split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    config = settings_of("somebody/chats,chitchat-dataset", max_dialogues=90)
    prepare(config, tmp_path / "whole")
    for count in (5, 4):
        with pytest.raises(Killed):
            prepare(config, tmp_path / "out", progress=stop_after(count))
    prepare(config, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_a_hub_that_is_lost_on_the_way_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [True]

    def unsteady(
        name: str, split: str, revision: str | None, streaming: bool
    ) -> Iterator[dict[str, Messages]]:
        for number, messages in enumerate(chats(0, 60)):
            if lost[0] and number == 40:
                raise ConnectionError("gone\nfor good")
            yield {"messages": messages}

    monkeypatch.setattr(datasets, "load_dataset", unsteady)
    config, out = settings_of("somebody/chats", tokenizer="gpt2"), tmp_path / "out"
    with pytest.raises(LostSourceError, match=r"behind row 40, the hub gave none \(gone\); check"):
        prepare(config, out)
    lost[0] = False
    told: list[int] = []
    prepare(config, out, progress=lambda what, count: told.append(count))
    assert 20 <= sum(told) < 40
    prepare(config, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("where", ["the second source", "training after what is held out"])
def test_a_hub_that_is_lost_at_the_start_of_a_source_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lost = [True]

    def unsteady(
        name: str, split: str, revision: str | None, streaming: bool
    ) -> Iterator[dict[str, Messages]]:
        begun.append(name)
        # the vocabulary and the first look at a name are behind
        if lost[0] and name == "b/b" and begun.count(name) > looks:
            raise ConnectionError("gone")
        return iter([{"messages": m} for m in (chats(0, 30) if name == "a/a" else chats(30, 60))])

    begun: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", unsteady)
    if where == "the second source":
        config, looks = settings_of("a/a,b/b", tokenizer="gpt2"), 0
    else:
        config, looks = settings_of("b/b", valid="a/a", tokenizer="gpt2"), 1
    out = tmp_path / "out"
    with pytest.raises(LostSourceError, match=r"more rows of b/b train_sft expected behind row 0"):
        prepare(config, out)
    lost[0] = False
    told: list[int] = []
    prepare(config, out, progress=lambda what, count: told.append(count))
    # of sixty dialogues one half was kept, but for what was on its way
    assert sum(told) < 45
    prepare(config, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.usefixtures("tiny")
def test_a_name_that_is_none_is_found_before_there_is_something_to_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def typo(name: str, **options: Any) -> Any:
        if name == "nobody/typo":
            raise FileNotFoundError("no such dataset")
        return iter([{"messages": m} for m in chats(0, 30)])

    monkeypatch.setattr(datasets, "load_dataset", typo)
    for config in (settings_of("a/a", valid="nobody/typo", tokenizer="gpt2"),
                   settings_of("nobody/typo", tokenizer="gpt2")):  # fmt: skip
        with pytest.raises(DataError, match="got 'nobody/typo' split"):
            prepare(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("0", chats(0, 40)), ("1", chats(40, 60))):
        path = folder / f"{name}.{form}"
        if form == "parquet":
            write_parquet(path, rows, 6)
        else:
            path.write_bytes(FORMS[form](packed(rows)))
    config, out = settings_of(folder, tokenizer="gpt2"), tmp_path / "out"
    rows_of = "_parquet_rows" if form == "parquet" else "_json_rows"
    whole = getattr(dialogues, rows_of)

    def failing(path: Path, behind: int) -> Iterator[Any]:
        if path.name == f"1.{form}":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        yield from whole(path, behind)

    monkeypatch.setattr(dialogues, rows_of, failing)
    with pytest.raises(LostSourceError, match=r"behind \w+ 0, but it could not be read \(Stale"):
        prepare(config, out)
    monkeypatch.setattr(dialogues, rows_of, whole)
    told: list[int] = []
    prepare(config, out, progress=lambda what, count: told.append(count))
    assert sum(told) < 45
    prepare(config, tmp_path / "whole")
    assert tree(out) == tree(tmp_path / "whole")


def test_what_is_pushed_to_the_hub_meanwhile_is_not_mixed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commits = ["first"]

    class Api:
        def dataset_info(self, name: str) -> Any:
            return SimpleNamespace(sha=commits[-1])

    def load(
        name: str, split: str, revision: str | None, streaming: bool
    ) -> list[dict[str, Messages]]:
        rows = chats(0, 20) if revision == "first" else chats(20, 40)
        return [{"messages": m} for m in rows]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    reader = DialogueReader("a/a,b/b", **READ)
    taken = list(islice(reader, 5))
    position = reader.position()
    assert position.revision == "first"
    commits.append("second")
    taken += list(DialogueReader("a/a,b/b", **READ, start=position))
    # the second dataset begins where it stands by then
    assert taken == chats(0, 20) + chats(20, 40)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "jsonl"])
def test_compressed_forms_are_equal_and_a_cut_one_is_one_error(tmp_path: Path, form: str) -> None:
    # more than a block, so that lines come before the cut
    rows = chats(0, 3000)
    compress, data = FORMS[form], packed(rows)
    path = tmp_path / f"a.{form}"
    path.write_bytes(compress(data))
    assert list(DialogueReader(str(path), **READ)) == rows
    # what was written in two parts is one file
    path.write_bytes(compress(data[:1000]) + compress(data[1000:]))
    assert list(DialogueReader(str(path), **READ)) == rows
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-4], whole[:3], b"plain text\n"):
        path.write_bytes(damaged)
        reader = DialogueReader(str(path), **READ)
        with pytest.raises(DataError, match="readable to its end, but behind line ") as caught:
            list(reader)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        assert f"behind line {reader.position().row}:" in str(caught.value)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(9) + whole[middle + 9 :])
    with pytest.raises(DataError, match="readable to its end"):
        list(DialogueReader(str(path), **READ))


def test_a_missing_compressed_file_is_no_hub_name() -> None:
    for form in FORMS:
        with pytest.raises(DataError, match="there is no"):
            list(DialogueReader(f"none.{form}", **READ))


def test_dialogues_are_encoded_beside_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch behind the one that is waited for must be read before that one is encoded."""
    tokenizer = ChatTokenizer.train(iter(["day"]), 300)
    monkeypatch.setattr(store, "_BATCH", 5)
    encode = tokenizer.encode_contents
    taken = [0]
    seen: list[int] = []

    def slow(batch: list[Messages]) -> Any:
        if not seen:
            limit = time.monotonic() + 10
            while taken[0] < 10 and time.monotonic() < limit:
                time.sleep(0.001)
        seen.append(taken[0])
        return encode(batch)

    def rows() -> Iterator[Messages]:
        for messages in chats(0, 20):
            taken[0] += 1
            yield messages

    monkeypatch.setattr(tokenizer, "encode_contents", slow)
    written = write_store(tmp_path / "store", rows(), tokenizer)
    assert written.num_dialogues == 20
    assert seen[0] == 10


def test_an_error_of_the_reader_is_not_held_back(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.train(iter(["day"]), 300)

    def rows() -> Iterator[Messages]:
        yield from chats(0, 700)
        raise DataError("line 701")

    with pytest.raises(DataError, match="line 701"):
        write_store(tmp_path / "store", rows(), tokenizer)
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), max_size=6),
    kept=st.integers(0, 6),
    rubbish=st.binary(max_size=9),
)
def test_a_store_that_is_cut_and_written_on_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], kept: int, rubbish: bytes
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    tokenizer = ChatTokenizer.train(iter(["day"]), 300)
    batches = [chats(10 * place, 10 * place + size) for place, size in enumerate([*sizes, 1])]
    encoded = [tokenizer.lay_out(batch, tokenizer.encode_contents(batch)) for batch in batches]
    with StoreWriter(folder) as writer:
        for batch in encoded[:kept]:
            writer.append(batch)
        counts = {"num_tokens": writer.num_tokens, "num_dialogues": writer.num_dialogues}
    assert StoreWriter.holds(folder, **counts)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes() + rubbish)
    with StoreWriter(folder, **counts) as writer:
        for batch in encoded[kept:]:
            writer.append(batch)
        writer.seal()
    found = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert found == naive([messages for batch in batches for messages in batch], tokenizer)
    TokenStore.open(folder)
    (folder / "tokens.bin").unlink()
    with pytest.raises(CheckpointError):
        TokenStore.open(folder)


MEMORY = """
import re, sys
from pathlib import Path
from new_llm.config import DataConfig
from new_llm.data import prepare
prepare(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2]), Path(sys.argv[3]))
# what getrusage says includes the process that started this one
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dialogues(tmp_path: Path) -> None:
    ChatTokenizer.train((m["content"] for d in chats(0, 50) for m in d), 300).save(tmp_path / "t")
    peaks = []
    longer = " and so on" * 30
    for count in (2000, 20_000):
        with (tmp_path / "a.jsonl").open("w") as file:
            for day in range(count):
                messages = [
                    {"role": role, "content": f"{role} of day {day}{longer}"}
                    for role in ("user", "assistant")
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
        arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "t"), str(tmp_path / f"{count}")]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    # all tokens together would make it 1.8
    assert peaks[1] < 1.5 * peaks[0]


def test_all_of_a_source_is_one_stream_of_dialogues(tmp_path: Path) -> None:
    source = write_forms(tmp_path / "forms")
    report = dialogues.ReadReport()
    rows = read_dialogues(str(source), **READ, report=report)
    assert list(rows) == chats(0, 360)
    assert report.num_bad_rows == 2 * len(FORMS)
