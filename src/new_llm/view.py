"""What can be seen of a conversation's context: how it settled, where it went, what it still knows.

A context that is carried is exact when it is read; how hard that was shows when all tokens are
solved at once: sweep by sweep each token's context comes to rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .doctor import THRESHOLDS
from .generate import Conversation
from .measurements import time_scales
from .recurrence import sweep

# tokens back of a reset that are looked at
DISTANCES = (1, 4, 16, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The tokens that a conversation read last, and what they did to its context."""

    tokens: list[str]
    """Text of each token, role tokens as they are written."""
    contexts: Tensor
    """After each token, `[T, K, C]`."""
    residuals: Tensor
    """Relative change of each token's context in each sweep, the largest of any block, `[S, T]`."""
    moves: Tensor
    """Relative change of the context by each token, the largest of any block, `[T]`."""
    time_scales: Tensor
    """Tokens after which a share of 1/e is left, by each gate at the last token, `[K, C]`."""

    @property
    def num_sweeps(self) -> Tensor:
        """Sweeps until each token's context rested, `[T]`; one more than were made where none."""
        resting = self.residuals.flip(0).le(THRESHOLDS.residual).long().cumprod(dim=0).sum(dim=0)
        return len(self.residuals) - resting + 1


@torch.no_grad()
def view(conversation: Conversation) -> View | None:
    """Look at a conversation; None where nothing was said, or where the model carries nothing.

    >>> from new_llm.config import ModelConfig, SampleConfig
    >>> from new_llm.checkpoint import Checkpoint
    >>> from new_llm.model import NewLLM
    >>> from new_llm.tokenizer import ChatTokenizer
    >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model = NewLLM(small, tokenizer.vocab_size).eval()
    >>> checkpoint = Checkpoint(model=model, tokenizer=tokenizer, config={})
    >>> talk = Conversation(checkpoint, SampleConfig(max_new_tokens=3))
    >>> _ = "".join(talk.reply("hello"))
    >>> seen = view(talk)
    >>> len(seen.tokens) == len(seen.contexts) == len(talk.recent)
    True
    """
    model, tokenizer = conversation.checkpoint.model, conversation.checkpoint.tokenizer
    if not conversation.recent or model.config.scope != "sequence":
        return None
    ids = torch.tensor([conversation.recent], device=model.embedding.weight.device)
    before = model.initial_context(1) if conversation.before is None else conversation.before
    inputs, contexts = model.stream_contexts(ids, before)
    histories, moves, scales = [], [], []
    for k, cell in enumerate(model.cells()):
        limit = THRESHOLDS.gate_scan_sweeps if cell.separates_gate else THRESHOLDS.jacobi_sweeps
        swept = sweep(
            cell, inputs[k], before[:, k], tolerance=THRESHOLDS.residual, max_sweeps=limit
        )
        histories.append(swept.history[:, 0])
        path = torch.cat([before[:, k], contexts[k][0]])
        moves.append(path.diff(dim=0).norm(dim=-1) / path[1:].norm(dim=-1).clamp(min=1e-9))
        last = cell.project(inputs[k][0, -1:])
        forget = cell.forget_gates(path[-2:-1], last, cell.weights())
        scales.append(time_scales(forget[0, -1]))
    # a block that rests sooner waits for the others
    length = max(map(len, histories))
    padded = [torch.cat([one, one.new_zeros(length - len(one), one.shape[1])]) for one in histories]
    return View(
        tokens=[tokenizer.decode([token]) for token in conversation.recent],
        contexts=torch.stack(contexts, dim=2)[0],
        residuals=torch.stack(padded).amax(dim=0),
        moves=torch.stack(moves).amax(dim=0),
        time_scales=torch.stack(scales),
    )


@torch.no_grad()
def forgetful(
    conversation: Conversation, distances: Sequence[int] = DISTANCES, *, num_tokens: int = 5
) -> list[tuple[int | None, list[tuple[str, float]]]]:
    """Return what the assistant would begin its next answer with, were its context reset.

    For each distance, the context is zeroed so many tokens back and only what follows is read; None
    stands for no reset. Tokens come with their probabilities, the most likely first.
    """
    model, tokenizer = conversation.checkpoint.model, conversation.checkpoint.tokenizer
    text = conversation.recent + tokenizer.answer_header()
    device = model.embedding.weight.device
    found: list[tuple[int | None, list[tuple[str, float]]]] = []
    for distance in (*(d for d in distances if d < len(text)), None):
        kept = text if distance is None else text[-distance:]
        before = conversation.before if distance is None else None
        output = model(torch.tensor([kept], device=device), before)
        share = model.logits(output.features[0, -1]).softmax(dim=-1)
        likely = share.topk(min(num_tokens, len(share)))
        said = [
            (tokenizer.decode([token]), value)
            for token, value in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        found.append((distance, said))
    return found


def planar(contexts: Tensor) -> Tensor:
    """Return contexts on the plane in which they differ most, `[N, C]` to `[N, 2]`.

    >>> planar(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0]])).abs().round(decimals=4).tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    centred = (contexts - contexts.mean(dim=0)).double()
    size = min(2, *centred.shape)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    flat = centred @ directions[:size].T
    return torch.nn.functional.pad(flat, (0, 2 - size)).float()


def distance(first: Tensor, second: Tensor) -> float:
    """Return how far two contexts are apart, as a share of the larger one.

    >>> distance(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    0.0
    """
    size = torch.maximum(first.norm(), second.norm()).clamp(min=1e-9)
    return ((first - second).norm() / size).item()
