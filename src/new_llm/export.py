"""A step as ONNX: token and context in, logits and the next context out.

What small devices want: a graph without loops whose memory is one tensor of fixed size.
Axes: `B` texts, `K` blocks, `C` context width, `V` vocabulary.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError, ConfigError
from .files import atomic_folder, write_manifest
from .model import NewLLM

# relative difference of onnxruntime from our own model that is accepted
TOLERANCE = 1e-4
# of step.json
_FORMAT_VERSION = 1
# texts that are compared, and their steps
_COMPARED, _STEPS = 4, 32


class Step(nn.Module):
    """One token of each text, limits applied beforehand; equal to `NewLLM.forward` on `[B, 1]`.

    Args:
        model: in evaluation mode and sequence scope.

    Raises:
        ConfigError: the model is of token scope, which has no step.

    >>> from new_llm.config import ModelConfig
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> model = NewLLM(small, 50).eval()
    >>> logits, context = Step(model)(torch.tensor([3, 4]), model.initial_context(2))
    >>> expected = model(torch.tensor([[3], [4]]))
    >>> torch.allclose(logits, model.logits(expected.features)[:, 0], atol=1e-5)
    True
    >>> torch.allclose(context, expected.context, atol=1e-5)
    True
    """

    def __init__(self, model: NewLLM) -> None:
        super().__init__()
        if model.config.scope != "sequence":
            raise ConfigError(
                "a model of sequence scope expected, one of token scope has no context that a "
                "step could carry on; train with --model.scope sequence"
            )
        self.model = model
        for k, cell in enumerate(model.cells()):
            for n, tensor in enumerate(cell.weights()):
                self.register_buffer(f"weights_{k}_{n}", tensor.detach().clone())
        self.counts = [len(cell.weights()) for cell in model.cells()]

    def forward(self, token: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Read a token of each text, `[B]`, from `[B, K, C]`; return `[B, V]` and `[B, K, C]`."""
        h = self.model.embed(token)
        after = []
        for k, block in enumerate(self.model.stages()):
            weights = tuple(self.get_buffer(f"weights_{k}_{n}") for n in range(self.counts[k]))
            own = block.cell.update(context[:, k], block.cell.project(block.norm(h)), weights)
            h = block.read(h, own)
            after.append(own)
        return self.model.logits(self.model.final_norm(h)), torch.stack(after, dim=1)


@torch.no_grad()
def export_onnx(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Write `step.onnx`, tokenizer and `step.json` to a folder, and compare it with our own model.

    Args:
        checkpoint: whose model is exported.
        folder: new or empty; whole or not there at all.

    Returns:
        What `step.json` holds: shapes, special ids, and the largest relative difference that
        onnxruntime had over 32 steps of 4 texts.

    Raises:
        ConfigError: the model has no step.
        CheckpointError: `folder` holds other files, or onnxruntime says something else.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"a new or empty folder expected, {folder} holds files; use another")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    step = Step(model).eval()
    with atomic_folder(folder) as part:
        path = part / "step.onnx"
        _write(step, path)
        carried = ["batch", *model.initial_context(1).shape[1:]]
        about = {
            "inputs": {"token": ["batch"], "context": carried},
            "outputs": {"logits": ["batch", model.vocab_size], "next_context": carried},
            "first_context": "zeros",
            "im_start_id": tokenizer.im_start_id,
            "im_end_id": tokenizer.im_end_id,
            "largest_relative_difference": _difference(step, path),
        }  # fmt: skip
        tokenizer.save(part)
        write_manifest(part / "step.json", about, version=_FORMAT_VERSION)
    return about


def _write(step: Step, path: Path) -> None:
    model = step.model
    batch = torch.export.Dim("batch", min=1)
    # what PyTorch's exporter says of itself is nothing that a user can mend
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            (torch.zeros(2, dtype=torch.long), model.initial_context(2)),
            input_names=["token", "context"],
            output_names=["logits", "next_context"],
            dynamic_shapes={"token": {0: batch}, "context": {0: batch}},
            dynamo=True,
            verbose=False,
            external_data=False,
        )
    assert program is not None
    program.save(str(path))


def _difference(step: Step, path: Path) -> float:
    """Return how far onnxruntime is from our own model over random texts.

    Raises:
        CheckpointError: further than `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(step.model.vocab_size, (_STEPS, _COMPARED), generator=generator)
    ours = theirs = step.model.initial_context(_COMPARED)
    largest = 0.0
    for token in tokens:
        logits, ours = step(token, ours)
        given = {"token": token.numpy(), "context": theirs.numpy()}
        found = [torch.from_numpy(array) for array in session.run(None, given)]
        theirs = found[1]
        for one, other in ((logits, found[0]), (ours, found[1])):
            largest = max(largest, ((one - other).norm() / one.norm()).item())
    if not largest <= TOLERANCE:
        raise CheckpointError(
            f"onnxruntime must agree with this model to {TOLERANCE:g}, it is {largest:.2g} away; "
            "try other versions of onnx and onnxruntime"
        )
    return largest
