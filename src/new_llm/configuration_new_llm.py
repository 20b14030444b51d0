"""The configuration of a New-LLM for Hugging Face: the model part of ours, no default of its own.

Travels with a checkpoint, together with `modeling_new_llm`.
"""

from typing import Any

from transformers import PreTrainedConfig

from .config import ModelConfig, SolverConfig, from_dict, to_dict


class NewLLMConfig(PreTrainedConfig):
    """Shape of a model and stop rule of its search, as `config.json` of a checkpoint holds them.

    Args:
        vocab_size: tokens of the vocabulary, role tokens included.
        model: fields of `ModelConfig`; those that are left out have its defaults.
        solver: fields of `SolverConfig`.
        use_cache: whether a forward pass returns the context.

    Raises:
        ConfigError: a field is unknown or out of its range.

    >>> config = NewLLMConfig(vocab_size=50, model={"context_width": 8, "num_blocks": 3})
    >>> config.hidden_size, config.num_hidden_layers, config.model["cell"]
    (256, 3, 'convex')
    """

    model_type = "new_llm"

    vocab_size: int = 4096
    model: dict[str, Any] | None = None
    solver: dict[str, Any] | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.model = to_dict(from_dict(ModelConfig, self.model or {}))
        self.solver = to_dict(from_dict(SolverConfig, self.solver or {}))
        kwargs["tie_word_embeddings"] = self.model["tied_readout"]
        super().__post_init__(**kwargs)

    @property
    def shape(self) -> ModelConfig:
        """The shape, as the model takes it."""
        return from_dict(ModelConfig, self.model or {})

    @property
    def stop_rule(self) -> SolverConfig:
        """The stop rule, as the model takes it."""
        return from_dict(SolverConfig, self.solver or {})

    @property
    def hidden_size(self) -> int:
        """Width of the stream, by the name that other tools ask for."""
        return self.shape.embedding_width

    @property
    def num_hidden_layers(self) -> int:
        """Blocks, by the name that other tools ask for."""
        return self.shape.num_blocks

    @property
    def max_position_embeddings(self) -> int:
        """For tools that must know a longest text; there is none, and there are no positions."""
        return 1_000_000

    @property
    def layer_types(self) -> list[str]:
        """What each block carries, in the words of the caches of transformers."""
        return ["linear_attention"] * self.num_hidden_layers
