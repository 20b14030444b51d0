"""Talking: pieces and stop strings, what a conversation keeps to be looked at, the terminal."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import real_dialogues, small_model
from new_llm import cli
from new_llm.checkpoint import Checkpoint, save_checkpoint
from new_llm.config import SampleConfig
from new_llm.doctor import THRESHOLDS
from new_llm.generate import RECENT, Conversation, Speech, generate, read
from new_llm.model import NewLLM
from new_llm.recurrence import sweep
from new_llm.tokenizer import ChatTokenizer
from new_llm.view import distance, forgetful, planar, view


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    contents = (message["content"] for messages in real_dialogues(8) for message in messages)
    tokenizer = ChatTokenizer.train(contents, 400)
    torch.manual_seed(0)
    model = NewLLM(small_model(), tokenizer.vocab_size).eval()
    with torch.no_grad():
        model.embedding.weight.normal_(std=0.5)
    return Checkpoint(model=model, tokenizer=tokenizer, config={})


@given(ids=st.lists(st.integers(0, 299), max_size=40))
@settings(max_examples=50, deadline=None)
def test_pieces_of_any_ids_are_their_text(ids: list[int]) -> None:
    decode = BYTES.stream_decoder()
    told, whole = "".join(map(decode, ids)), BYTES.decode(ids)
    # only what may become a character is held back
    assert (whole.startswith(told) and "\ufffd" in whole[len(told) :]) or whole == told


BYTES = ChatTokenizer.train(iter(["hello hello \u4f60\u597d"]), 300)


def test_a_speech_says_why_it_ended_and_what_it_read(loaded: Checkpoint) -> None:
    ids = loaded.tokenizer.encode("how are you")
    said = Speech(loaded, ids, SampleConfig(max_new_tokens=9, seed=3))
    text = "".join(said)
    assert said.finish == "length" and said.num_drawn == 9 and said.num_prompt == len(ids)
    assert loaded.tokenizer.decode(said.ids[len(ids) :]).startswith(text)
    assert said.context is not None
    expected = read(loaded.model, torch.tensor([said.ids])).context
    assert torch.allclose(said.context, expected, atol=1e-5)


def test_a_stop_string_ends_a_speech_wherever_tokens_part_it(loaded: Checkpoint) -> None:
    ids, config = loaded.tokenizer.encode("how are you"), SampleConfig(max_new_tokens=40, seed=3)
    whole = generate(loaded, "how are you", config)
    begun = [len(generate(loaded, "how are you", replace(config, max_new_tokens=count)))
             for count in range(1, 41)]  # fmt: skip
    for start in range(1, len(whole) - 4):
        stop = whole[start : start + 4]
        said = Speech(loaded, ids, config, stop=("never said", stop))
        assert "".join(said) == whole[: whole.find(stop)]
        needed = 1 + sum(length < whole.find(stop) + len(stop) for length in begun)
        assert said.finish == "stop" and said.num_drawn == needed
    # what waits for the rest of a stop string is shown where the rest never comes
    said = Speech(loaded, ids, config, stop=(whole[-1] + "never said",))
    assert "".join(said) == whole


def test_an_answer_that_is_not_heard_out_was_not_said(loaded: Checkpoint) -> None:
    talk = Conversation(loaded, SampleConfig(max_new_tokens=6))
    "".join(talk.reply("hello"))
    before, kept = talk.context, [*talk.recent]
    pieces = talk.reply("and you?")
    for _ in range(2):
        next(pieces)
    del pieces
    assert talk.context is before and talk.recent == kept and talk.num_turns == 1


def test_a_conversation_reads_one_well_formed_dialogue(loaded: Checkpoint) -> None:
    talk = Conversation(loaded, SampleConfig(max_new_tokens=5, seed=1))
    answers = ["".join(talk.reply(text)) for text in ("hello", "how are you?")]
    assert talk.context is not None
    said = loaded.tokenizer.decode_dialogue(torch.tensor(talk.recent).numpy())
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    for message, answer in zip(said[1::2], answers, strict=True):
        assert message["content"].startswith(answer)
    # answers that were cut off are closed before the next turn begins
    assert talk.recent.count(loaded.tokenizer.im_end_id) == 4
    expected = read(loaded.model, torch.tensor([talk.recent])).context
    assert torch.allclose(talk.context, expected, atol=1e-5)


def test_what_is_kept_to_be_looked_at_stays_small_and_true(loaded: Checkpoint) -> None:
    talk = Conversation(loaded, SampleConfig(max_new_tokens=2))
    for _ in range(4):
        "".join(talk.reply("hello " * RECENT))
    assert talk.last is not None and talk.context is not None and talk.before is not None
    assert len(talk.recent) <= RECENT + len(talk.last.ids) + 2
    again = read(loaded.model, torch.tensor([talk.recent]), talk.before).context
    assert torch.allclose(talk.context, again, atol=1e-4)


@torch.no_grad()
def test_a_view_is_of_the_conversation(loaded: Checkpoint) -> None:
    talk = Conversation(loaded, SampleConfig(max_new_tokens=5))
    assert view(talk) is None
    "".join(talk.reply("hello, who are you?"))
    seen = view(talk)
    assert seen is not None and talk.context is not None
    assert "".join(seen.tokens) == loaded.tokenizer.decode(talk.recent)
    assert torch.allclose(seen.contexts[-1], talk.context[0], atol=1e-5)
    ids = torch.tensor([talk.recent])
    inputs, contexts = loaded.model.stream_contexts(ids, loaded.model.initial_context(1))
    histories = [
        sweep(cell, x, torch.zeros(1, cell.context_width), tolerance=THRESHOLDS.residual)
        for cell, x in zip(loaded.model.cells(), inputs, strict=True)
    ]
    sweeps = max(one.num_sweeps for one in histories)
    assert len(seen.residuals) == sweeps == int(seen.num_sweeps.max())
    assert torch.allclose(
        seen.residuals[0], torch.stack([one.history[0, 0] for one in histories]).amax(dim=0)
    )
    (first, second) = contexts[0][0, -2:], contexts[1][0, -2:]
    moved = max(((c[1] - c[0]).norm() / c[1].norm()).item() for c in (first, second))
    assert seen.moves[-1].item() == pytest.approx(moved, rel=1e-4)
    assert seen.time_scales.shape == (2, 16) and (seen.time_scales > 0).all()
    told = {distance: said for distance, said in forgetful(talk, (1, 4), num_tokens=400)}
    assert list(told) == [1, 4, None]
    for distance_back, said in told.items():
        assert sum(share for _, share in said) == pytest.approx(1.0, abs=1e-4)
        kept = (talk.recent + loaded.tokenizer.answer_header())[-(distance_back or 10**6) :]
        last = loaded.model.logits(loaded.model(torch.tensor([kept])).features[0, -1])
        best = loaded.tokenizer.decode([int(last.argmax())])
        assert said[0][0] == best


def test_a_plane_keeps_distances_that_lie_in_it() -> None:
    flat = torch.randn(20, 2)
    turned = flat @ torch.linalg.qr(torch.randn(7, 7)).Q[:2]
    found = planar(turned + 3.0)
    assert torch.allclose(torch.cdist(found, found), torch.cdist(flat, flat), atol=1e-4)
    assert planar(torch.ones(1, 5)).tolist() == [[0.0, 0.0]]


def test_branches_of_a_talk_go_their_own_way(
    loaded: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_checkpoint(tmp_path / "c", loaded.model, loaded.tokenizer)
    said = iter(["hello", "/fork other", "what now", "/go main", "/go nowhere", "/fork",
                 "/fork main", "/help", "/quit"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert cli.main(["chat", str(tmp_path / "c"), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "main · turn 1 · 5 tokens" in out and "other · turn 2 · " in out
    assert "settled in" in out and "last token moved it by" in out
    assert "main, turn 1; its context is" in out and "% away" in out
    assert "one of main, other expected, got nowhere" in out
    assert "a new name expected, there is a branch main" in out
    assert out.count("commands: /reset") == 2 and "go on in a copy of the talk" in out


@pytest.mark.parametrize("characters", ["utf-8:strict", "ascii"])
def test_bytes_that_are_no_text_do_not_end_a_talk(
    characters: str, loaded: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", loaded.model, loaded.tokenizer)
    said = b"hello\n\xff\xfe\nhow are you\n/quit\n"
    told = subprocess.run(
        [sys.executable, "-m", "new_llm", "chat", str(tmp_path / "c"), "--max-new-tokens", "2"],
        input=said,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": characters, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert told.returncode == 0 and not told.stderr
    out = told.stdout.decode()
    assert "UTF-8 text expected" in out and "turn 2" in out


def test_distance_is_a_share_of_the_larger_context() -> None:
    assert distance(torch.zeros(1, 1, 4), torch.ones(1, 1, 4)) == pytest.approx(1.0)
