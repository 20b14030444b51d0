"""Our model in lm-evaluation-harness, and tasks on dialogues: `python -m new_llm.harness`.

Takes the arguments of `lm_eval`, which knows `--model new_llm` and the tasks `dialogues` and
`answers` then. `--model hf` does the same through transformers; this one reads texts of any length
in flat memory, and its own checkpoints with their checks.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"new-llm: the package {error.name} expected, it is not installed; "
        'pip install "new-llm[evaluation]"',
        file=sys.stderr,
    )
    sys.exit(2)
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .checkpoint import load_checkpoint
from .config import SampleConfig
from .errors import NewLLMError
from .generate import Speech
from .model import token_losses

TASKS = Path(__file__).with_name("harness_tasks")
# positions that are read at once
_SEGMENT = 1024
_LOSS_CHUNK = 1024


class HarnessLM(TemplateLM):
    """A checkpoint of ours, as the harness asks for it.

    Args:
        pretrained: a run's folder or its checkpoint.
        batch_size: texts side by side.
        device: of PyTorch; a GPU that is not there is the CPU, as elsewhere in the harness.
        kwargs: of other models, not used.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """

    def __init__(
        self, pretrained: str, batch_size: int | str = 16, device: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.checkpoint = load_checkpoint(pretrained)
        absent = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        self._place = torch.device("cpu" if device is None or absent else device)
        self.model = self.checkpoint.model.to(self._place)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 16
        self.pretrained = pretrained

    @property
    def eot_token_id(self) -> int:
        """The id that ends a message."""
        return self.checkpoint.tokenizer.im_end_id

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached by."""
        return self.checkpoint.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return ids; role tokens that are written in a text are role tokens."""
        return self.checkpoint.tokenizer.encode_marked(string)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name that requests in ChatML are cached by."""
        return "chatml"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages between their role tokens."""
        told = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat_history)
        return told + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in nats."""
        asked = [
            ((), [self.eot_token_id], self.tok_encode(request.args[0])) for request in requests
        ]
        return [value for value, _ in self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # texts of about one length side by side
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1] + requests[n][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm):
            part = order[start : start + self.batch_size]
            pairs = [(requests[n][1], requests[n][2]) for n in part]
            found |= dict(zip(part, self._scored(pairs), strict=True))
        return [found[n] for n in range(len(requests))]

    def _scored(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log-likelihood and whether each token was the likeliest, of the second parts."""
        texts = [torch.tensor(before + after) for before, after in pairs]
        whole = pad_sequence(texts, batch_first=True).to(self._place)
        ids, targets = whole[:, :-1], whole[:, 1:]
        ends = torch.tensor([len(text) for text in texts], device=self._place)
        begins = torch.tensor([len(before) for before, _ in pairs], device=self._place)
        place = torch.arange(1, whole.shape[1], device=self._place)
        # position of a target in its text
        scored = (place >= begins[:, None]) & (place < ends[:, None])
        real = place <= ends[:, None]
        nats = torch.zeros(len(pairs), dtype=torch.float64, device=self._place)
        missed = torch.zeros(len(pairs), device=self._place)
        context: Tensor | None = None
        for start in range(0, ids.shape[1], _SEGMENT):
            cut = slice(start, start + _SEGMENT)
            output = self.model(ids[:, cut], context, real=real[:, cut])
            context = output.context
            rows, columns = scored[:, cut].nonzero(as_tuple=True)
            if len(rows):
                found = token_losses(
                    output.features[rows, columns], self.model.readout.weight,
                    targets[:, cut][rows, columns], torch.ones(len(rows), device=self._place),
                    chunk=_LOSS_CHUNK,
                )  # fmt: skip
                nats.index_add_(0, rows, found.nats.double())
                missed.index_add_(0, rows, (~found.correct).float())
        return [
            (-value, not wrong) for value, wrong in zip(nats.tolist(), missed.tolist(), strict=True)
        ]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue prompts up to their stop strings; greedily, unless told otherwise."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm):
            prompt, options = request.args
            until = options.get("until") or []
            samples = options.get("do_sample", False)
            config = SampleConfig(
                max_new_tokens=int(options.get("max_gen_toks", 256)),
                temperature=float(options.get("temperature", 1.0)) if samples else 0.0,
                top_k=int(options.get("top_k", 0)),
                top_p=float(options.get("top_p", 1.0)),
            )
            said = Speech(
                self.checkpoint, self.tok_encode(prompt), config, stop_ids=(self.eot_token_id,),
                stop=tuple([until] if isinstance(until, str) else until),
            )  # fmt: skip
            texts.append("".join(said))
        return texts


register_model("new_llm")(HarnessLM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lm_eval`, whose arguments it takes, with our model and tasks; return the exit code."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] not in (["ls"], ["validate"], ["run"]) and given[:1] not in (["-h"], ["--help"]):
        given = ["run", *given]
    if given[:1] != ["-h"] and "--include_path" not in given:
        given += ["--include_path", str(TASKS)]
    setup_logging()
    harness = HarnessCLI()
    before, sys.argv = sys.argv, [sys.argv[0], *given]
    try:
        harness.execute(harness.parse_args())
    except NewLLMError as error:
        print(f"new-llm: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
