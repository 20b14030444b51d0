"""Tasks on dialogues for lm-evaluation-harness; they need nothing of this package.

The rows of a JSONL file, each with `messages` of `role` and `content`, as ChatML text. Named by
`--metadata '{"data": "held_out.jsonl", "tokenizer": "runs/a/checkpoint"}'`; the tokenizer counts
the tokens of a loss.
"""

import json
import random
from pathlib import Path
from typing import Any

# wrong answers beside the right one, and the seed by which they are drawn
_NUM_WRONG, _SEED = 3, 0


def load(data: str, tokenizer: str = "", limit: int | None = None, **_: Any) -> dict[str, Any]:
    """Return the dialogues of a JSONL file as the split `test`.

    Args:
        data: the file.
        tokenizer: folder or name; without one, `loss` is nats a byte of content.
        limit: of dialogues.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    lines = Path(data).read_text(encoding="utf-8").splitlines()[:limit]
    counted = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else None
    rows = []
    for line in lines:
        messages = [
            {"role": m["role"], "content": m["content"]} for m in json.loads(line)["messages"]
        ]
        whole = "".join(map(marked, messages))
        num_bytes = sum(len(message["content"].encode()) for message in messages)
        num_tokens = num_bytes if counted is None else len(counted(whole)["input_ids"]) - 1
        rows.append(
            {"text": whole.removeprefix("<|im_start|>"), "num_bytes": num_bytes,
             "num_tokens": num_tokens, "messages": messages}
        )  # fmt: skip
    return {"test": Dataset.from_list(rows)}


def marked(message: dict[str, str]) -> str:
    """Return a message between its role tokens.

    >>> marked({"role": "user", "content": "Hi"})
    '<|im_start|>user\\nHi<|im_end|>\\n'
    """
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def losses(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Return the weighted figures of one dialogue."""
    ((log_likelihood, _),) = results
    return {
        "loss": (-log_likelihood, doc["num_tokens"]),
        "bits_per_byte": (log_likelihood, doc["num_bytes"]),
    }


def per_token(items: list[tuple[float, int]]) -> float:
    """Return nats a token over all dialogues.

    >>> per_token([(6.0, 2), (2.0, 2)])
    2.0
    """
    return sum(nats for nats, _ in items) / sum(count for _, count in items)


def with_choices(dataset: Any) -> Any:
    """Return the first answer of each dialogue among answers of others, and what stands before."""
    from datasets import Dataset

    firsts = []
    for row in dataset:
        said = [message["role"] for message in row["messages"]]
        if "assistant" in said and said.index("assistant") > 0:
            firsts.append((row["messages"], said.index("assistant")))
    drawn, rows = random.Random(_SEED), []
    for number, (messages, place) in enumerate(firsts):
        others = drawn.sample([n for n in range(len(firsts)) if n != number],
                              min(_NUM_WRONG, len(firsts) - 1))  # fmt: skip
        choices = [firsts[n][0][firsts[n][1]]["content"] for n in others]
        answer = drawn.randrange(len(choices) + 1)
        choices.insert(answer, messages[place]["content"])
        before = "".join(map(marked, messages[:place])) + "<|im_start|>assistant\n"
        rows.append(
            {"before": before, "choices": [text + "<|im_end|>" for text in choices],
             "answer": answer}
        )  # fmt: skip
    return Dataset.from_list(rows)
