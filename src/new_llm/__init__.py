"""New-LLM: language models whose memory of a text is one vector that settles at a fixed point.

The public names are loaded when they are first used, so that `import new_llm` stays fast.
"""

from importlib import import_module
from typing import Any

from .announce import announce

__version__ = "0.1.0"

_HOME = {
    "ConvexCell": "cell",
    "LayerwiseCell": "cell",
    "SequentialCell": "cell",
    "RunConfig": "config",
    "SampleConfig": "config",
    "preset": "config",
    "FixedPoint": "fixed_point",
    "solve": "fixed_point",
    "NewLLM": "model",
    "NewLLMConfig": "configuration_new_llm",
    "NewLLMForCausalLM": "modeling_new_llm",
    "NewLLMModel": "modeling_new_llm",
    "load_checkpoint": "checkpoint",
    "Conversation": "generate",
    "run": "pipeline",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'new_llm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


announce()
