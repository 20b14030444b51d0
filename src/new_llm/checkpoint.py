"""A checkpoint: one folder with weights, shape and tokenizer; whole or not there at all.

`config.json` says what the model is, `model.safetensors` holds the weights and `tokenizer.json`
the vocabulary: what transformers reads. The modelling files lie beside them, for users who let it
run them (`trust_remote_code`); we load nothing that can run code.
"""

import hashlib
import operator
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .card import write_card
from .cell import ContextCell, ConvexCell, Weights
from .config import ModelConfig, SolverConfig, fingerprint, from_dict, to_dict
from .data import ChatTokenizer
from .errors import CheckpointError, ConfigError, NonFiniteError, shown
from .files import (
    atomic_folder,
    checksums,
    disk_error,
    read_json,
    recover_folder,
    require_files,
    require_sealed,
    understood,
    write_json,
    write_sealed,
)
from .measurements import pair_ratios, upper_factor
from .model import LanguageModel, NewLLM, num_parameters
from .stepper import Steppers
from .watch import first_bad

FORMAT_VERSION = 6
# of a context that is kept in a file
CONTEXT_VERSION = "1"
WEIGHTS = "model.safetensors"
# the card is written again once a run is finished, and may be edited
_UNSEALED = ("config.json", "README.md")
_AGAIN = "copy or train the checkpoint again"
# what our model is called inside of `NewLLMForCausalLM`
_INSIDE = "model.network."
# `modeling_new_llm` and all that it imports of this package
TRAVELLING = ("modeling_new_llm", "configuration_new_llm", "model", "cell", "config", "errors",
              "fixed_point", "recurrence", "scan")  # fmt: skip
# relative difference of a number computed again from the same weights, on another machine
_SAME = {"q2": 1e-3, "q_inf": 1e-3, "rate": 1e-2}
# few iterations: a cell that expands would carry one machine's rounding into the rate
_RATED_ITERATIONS = 8
_RATED_IDS = 256


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model with the tokenizer that it was trained with."""

    model: NewLLM
    tokenizer: ChatTokenizer
    config: dict[str, Any]
    steppers: Steppers = field(default_factory=Steppers, repr=False, compare=False)
    """What its texts share; the model must not change once it has spoken."""


def weights_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits over every tensor's name, shape and bytes."""
    digest = {
        name: fingerprint([list(tensor.shape), _bytes_digest(tensor)])
        for name, tensor in model.state_dict().items()
    }
    return fingerprint(digest)


def _bytes_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def save_checkpoint(folder: Path, model: NewLLM, tokenizer: ChatTokenizer) -> None:
    """Write a checkpoint folder, replacing the one that was there only when all is written.

    Raises:
        DiskFullError: there was no room; the old checkpoint is as it was.
        NonFiniteError: a weight is NaN or infinite; the old checkpoint is as it was.
    """
    bad = first_bad(dict(model.state_dict()))
    if bad:
        raise NonFiniteError(
            f"weights of a checkpoint must be finite, got others for {folder}{bad}"
        )
    with atomic_folder(folder) as part:
        save_weights(part / WEIGHTS, model)
        tokenizer.save(part)
        for name in TRAVELLING:
            shutil.copyfile(Path(__file__).with_name(f"{name}.py"), part / f"{name}.py")
        rates = contraction(model)
        write_card(part, contraction=rates, num_parameters=num_parameters(model))
        ends = {"eos_token_id": tokenizer.im_end_id, "pad_token_id": tokenizer.im_end_id}
        write_json(part / "generation_config.json", ends)
        write_sealed(
            part / "config.json",
            {
                "model_type": "new_llm",
                "architectures": ["NewLLMForCausalLM"],
                "auto_map": {
                    "AutoConfig": "configuration_new_llm.NewLLMConfig",
                    "AutoModel": "modeling_new_llm.NewLLMModel",
                    "AutoModelForCausalLM": "modeling_new_llm.NewLLMForCausalLM",
                },
                "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
                **ends,
                "vocab_size": model.vocab_size,
                "model": to_dict(model.config),
                "solver": to_dict(model.solver),
                "tokenizer": tokenizer.fingerprint,
                "files": checksums(part, leave_out=_UNSEALED),
                "contraction": rates,
            },
            version=FORMAT_VERSION,
        )


@torch.no_grad()
def contraction(model: NewLLM) -> list[dict[str, float]]:
    """Return what is proved and what is measured of the contraction of each block's cell.

    `q2` and `q_inf` bound ConvexCell's factor whatever the tokens are, by full decomposition;
    `rate` is the 99th percentile of pair ratios of any cell, on tokens from all of the vocabulary
    and the contexts that a few iterations from zero reach.
    """
    was_training = model.training
    model.eval()
    ids = torch.linspace(0, model.vocab_size - 1, min(_RATED_IDS, model.vocab_size)).long()
    inputs = model.search(ids.to(model.embedding.weight.device)).inputs
    found = []
    for cell, x in zip(model.cells(), inputs, strict=True):
        projected, weights = cell.project(x), cell.weights()
        context = x.new_zeros(len(x), cell.context_width)
        for _ in range(_RATED_ITERATIONS):
            context = cell.search_map(context, projected, weights)
        apply = partial(_search_map, cell, projected, weights)
        proved = cell.coupling() if isinstance(cell, ConvexCell) else {}
        found.append({**proved, "rate": upper_factor(pair_ratios(apply, context))})
    model.train(was_training)
    return found


def _search_map(
    cell: ContextCell, projected: Tensor, weights: Weights, context: Tensor, rows: Tensor
) -> Tensor:
    return cell.search_map(context, projected[rows], weights)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write every tensor of a model once."""
    save_tensors(path, weight_tensors(model))


def weight_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a model by its name in a file; a shared read-out is there once."""
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    if _shares_readout(model):
        del tensors["readout.weight"]
    inside = _INSIDE if isinstance(model, NewLLM) else ""
    return {inside + name: value for name, value in tensors.items()}


def _shares_readout(model: nn.Module) -> bool:
    return isinstance(model, LanguageModel) and model.readout.weight is model.embedding.weight


def save_tensors(
    path: Path, tensors: dict[str, Tensor], *, about: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, and what is to be known of it.

    Raises:
        DiskFullError: there was no room.
        CheckpointError: `path` cannot be written.
    """
    try:
        # transformers asks which framework wrote a file
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path,
                  metadata={"format": "pt", **(about or {})})  # fmt: skip
    # the Rust library takes names in UTF-8 only, and none with a zero byte
    except (UnicodeError, ValueError) as error:
        raise CheckpointError(f"{path} must be written, but {error}; choose another name") from None
    except SafetensorError as error:
        # the Rust library has no other place for the system's error number
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise disk_error(OSError(code, os.strerror(code)), path) from error


def load_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged; `kind` says what it should have been.
    """
    if not path.is_file():
        raise CheckpointError(f"{kind} expected, but there is no {path}; the folder is incomplete")
    try:
        return load_file(path)
    # the second: types of numbers that this library knows and PyTorch does not
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{kind} expected, but {path} is damaged ({error}); train or copy it again"
        ) from None


def save_context(path: Path, context: Tensor, model: NewLLM) -> None:
    """Write a context of a model, whole, with its checksum and whose it is.

    Raises:
        DiskFullError: there was no room; what was there is as it was.
        CheckpointError: `path` cannot be written.
    """
    about = {"format_version": CONTEXT_VERSION, "checksum": _bytes_digest(context),
             "model": weights_fingerprint(model)}  # fmt: skip
    save_tensors(path, {"context": context}, about=about)


def load_context(path: Path, model: NewLLM) -> Tensor:
    """Return a context that `save_context` wrote of this model.

    Raises:
        CheckpointError: it is missing, damaged, or of another model.
    """
    found = load_tensors(path, "a saved context").get("context")
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    wanted = model.initial_context(1)
    if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        given = None if found is None else f"{tuple(found.shape)}, {found.dtype}"
        raise CheckpointError(
            f"a context of shape {tuple(wanted.shape)}, {wanted.dtype} expected, {path} holds "
            f"{given}; load one that this model saved"
        )
    if about.get("format_version") != CONTEXT_VERSION or (
        about.get("checksum") != _bytes_digest(found)
    ):
        raise CheckpointError(
            f"a saved context of format {CONTEXT_VERSION} with its checksum expected, {path} is "
            "damaged or of another version; save it again"
        )
    if about.get("model") != weights_fingerprint(model):
        raise CheckpointError(
            f"a context of this model expected, {path} is of {about.get('model')}; "
            "load one that this model saved"
        )
    return found.to(wanted.device)


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill a model from a safetensors file.

    Raises:
        CheckpointError: the file is damaged or of another shape.
    """
    tensors = load_tensors(path, "weights")
    if isinstance(model, NewLLM):
        tensors = {name.removeprefix(_INSIDE): value for name, value in tensors.items()}
    if _shares_readout(model) and "embedding.weight" in tensors:
        tensors["readout.weight"] = tensors["embedding.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path} must fit the model of config.json, but {first}") from None


def _check_shapes(path: Path, model: nn.Module) -> None:
    wanted = sum(parameter.numel() for parameter in model.parameters())
    # any type of number has a byte
    if path.stat().st_size < wanted:
        raise CheckpointError(
            f"{path} must fit the model of config.json, but {wanted:,} numbers do not fit into "
            f"{path.stat().st_size:,} bytes; copy or train the checkpoint again"
        )


def resolve(folder: Path) -> Path:
    """Return the checkpoint folder of a run's DIR or of the checkpoint itself.

    Raises:
        CheckpointError: neither is there.
    """
    inside = folder / "checkpoint"
    recover_folder(inside)
    for candidate in (inside, folder):
        if (candidate / WEIGHTS).is_file() or (candidate / "tokenizer_config.json").is_file():
            return candidate
    raise CheckpointError(
        f"a run's folder or its checkpoint expected, but {folder} holds no {WEIGHTS}; "
        "name the folder given to --out"
    )


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a checkpoint for inference, in evaluation mode, and check that it is whole.

    Raises:
        CheckpointError: a file is missing, truncated, changed or of another format; the tokenizer
            does not fit the model; its contraction is not what was written.

    >>> import tempfile
    >>> from new_llm.config import ModelConfig
    >>> tokenizer = ChatTokenizer.train(iter(["hello hello"]), 300)
    >>> small = ModelConfig(context_width=8, embedding_width=8, hidden_width=8, mlp_width=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(Path(folder) / "a", NewLLM(small, tokenizer.vocab_size), tokenizer)
    ...     loaded = load_checkpoint(Path(folder) / "a")
    >>> loaded.model.config == small, loaded.model.training
    (True, False)
    """
    path = resolve(Path(folder))
    config = read_json(path / "config.json", "a checkpoint's config")
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint format {FORMAT_VERSION} expected, {path} has {version}; "
            "load it with the version that wrote it"
        )
    # transformers saved it where there is no checksum
    written = any(config.get(name) is not None for name in ("files", "checksum"))
    if written:
        kind = "a checkpoint's config"
        require_sealed(path / "config.json", config, kind, version=version, remedy=_AGAIN)
        require_files(path, config["files"], remedy=_AGAIN)
    with understood(path / "config.json", "a checkpoint's config"):
        vocab_size, known_by = operator.index(config["vocab_size"]), config.get("tokenizer")
        model_values, solver_values = config["model"], config["solver"]
    tokenizer = ChatTokenizer.load(path)
    same = not written or tokenizer.fingerprint == known_by
    if tokenizer.vocab_size != vocab_size or not same:
        raise CheckpointError(
            f"the checkpoint's own tokenizer expected ({vocab_size} tokens, "
            f"{shown(known_by)}), {path} has one of {tokenizer.vocab_size} tokens "
            f"({tokenizer.fingerprint}); put the original tokenizer.json back"
        )
    try:
        model_config = from_dict(ModelConfig, model_values)
        solver = from_dict(SolverConfig, solver_values)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be used: {error}") from None
    with torch.random.fork_rng(devices=[]):
        # shapes alone first: a config that asks for more than its weights would fill the memory
        with torch.device("meta"):
            _check_shapes(path / WEIGHTS, NewLLM(model_config, vocab_size, solver))
        model = NewLLM(model_config, vocab_size, solver)
    # what was saved is exact: to compute it again would round it otherwise on another machine
    model.eval()
    load_weights(path / WEIGHTS, model)
    if not written:
        # transformers saves it in training too
        model.train().eval()
    else:
        _check_contraction(path, contraction(model), config.get("contraction"))
    return Checkpoint(model=model, tokenizer=tokenizer, config=config)


def _check_contraction(path: Path, found: list[dict[str, float]], written: Any) -> None:
    """Compare what the weights have with what was written of them."""
    names = [{(name, float) for name in block} for block in found]
    if not isinstance(written, list) or names != [
        {(name, type(value)) for name, value in block.items()} if isinstance(block, dict) else None
        for block in written
    ]:
        raise CheckpointError(
            f"{path / 'config.json'} must hold q2, q_inf and rate of each block as `contraction`, "
            "but does not; load it with the version that wrote it"
        )
    for k, (now, then) in enumerate(zip(found, written, strict=True)):
        for name, value in now.items():
            if not abs(value - then[name]) <= _SAME[name] * max(abs(value), 1e-6):
                raise CheckpointError(
                    f"{name} of {then[name]:.4f} is written in {path} for block {k + 1}, its "
                    f"weights have {value:.4f}; the checkpoint was changed, train or copy it again"
                )
