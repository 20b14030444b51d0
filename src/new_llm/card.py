"""The model card of a checkpoint: what it is, what it learnt from, what was found, its limits."""

from pathlib import Path
from typing import Any

from .config import RunConfig, to_dict
from .files import write_text
from .measurements import LONGEST_REACH

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# what stands in the card of each block's contraction, as `checkpoint.contraction` names it
_CONTRACTION = ("q2", "q_inf", "rate")


def write_card(
    checkpoint: Path,
    *,
    contraction: list[dict[str, float]],
    num_parameters: int,
    run: RunConfig | None = None,
    result: dict[str, Any] | None = None,
    prepared: dict[str, Any] | None = None,
) -> None:
    """Write `README.md` beside the weights, as the hub shows it.

    Args:
        checkpoint: the folder.
        contraction: what is proved and measured of each block.
        num_parameters: shared ones once.
        run: the config that trained it; without it the card says what the weights say.
        result: what `result.json` holds, once the model was judged.
        prepared: what the run's data came to.

    Raises:
        DiskFullError: there was no room.
    """
    # a hundred milliseconds that only training pays
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    found = []
    if run is not None and result is not None:
        names = {"loss": "nats a token", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}
        found = [
            EvalResult(
                task_type="text-generation",
                dataset_type=_source(run),
                dataset_name="held-out dialogues",
                metric_type=name,
                metric_name=called,
                metric_value=round(result["evaluation"][name], 4),
            )
            for name, called in names.items()
        ]
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["new-llm", "recurrent", "fixed-point", "conversational"],
        model_name="New-LLM" if found else None,
        eval_results=found or None,
    )
    card = ModelCard.from_template(
        about,
        template_path=str(_TEMPLATE),
        num_parameters=num_parameters,
        contraction=[
            {name: block.get(name) for name in _CONTRACTION} for block in contraction
        ],
        run=None if run is None else to_dict(run),
        source=None if run is None else _source(run),
        result=result,
        prepared=prepared or {},
        verdicts=[] if result is None else [
            (scope, diagnosis["verdicts"])
            for scope, diagnosis in result["verdict_final"].items()
            if diagnosis is not None
        ],
        reach=None if result is None else _reach(result),
    )  # fmt: skip
    write_text(checkpoint / "README.md", str(card))


def _source(run: RunConfig) -> str:
    """Return what the dialogues are called, nothing of the machine that they lay on."""
    parts = run.data.source.split(",")
    return ", ".join(Path(part).name if Path(part).exists() else part for part in parts)


def _reach(result: dict[str, Any]) -> float | None:
    """Return the number of tokens beyond which the context is worth next to nothing, if any."""
    sequence = result["verdict_final"].get("sequence") or {}
    rows = sequence.get("measurements", {})
    found = [row["value"] for name, row in rows.items()
             if name.rpartition(": ")[2] == "effective_context_length"]  # fmt: skip
    # a text that is still worth something as far back as was looked has no such number
    return next((value for value in found if value is not None and value < LONGEST_REACH), None)
