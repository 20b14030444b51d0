"""New-LLM as a model of Hugging Face transformers: the context is its cache.

Travels with a checkpoint, so that `trust_remote_code` loads it where this package is not installed.
Axes: `B` texts, `T` positions, `K` blocks, `C` context width, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_new_llm import NewLLMConfig
from .model import NewLLM


@dataclass
class NewLLMOutput(ModelOutput):
    """What `NewLLMModel` returns."""

    last_hidden_state: Tensor | None = None
    """Normalised stream before the vocabulary, `[B, T, E]`."""
    cache: DynamicCache | None = None
    """The context after the last position: `recurrent_states[0]` of a block's layer, `[B, C]`."""


@dataclass
class NewLLMCausalLMOutput(ModelOutput):
    """What `NewLLMForCausalLM` returns."""

    loss: Tensor | None = None
    """Cross-entropy of the labels, a scalar."""
    logits: Tensor | None = None
    """`[B, T, V]`."""
    cache: DynamicCache | None = None
    """As in `NewLLMOutput`."""


class NewLLMPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = NewLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    # a context cannot be taken back to an earlier token
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: each module has drawn its weights when it was made."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; a checksum and rates of other weights are not kept."""
        for name in ("files", "checksum", "contraction"):
            if hasattr(self.config, name):
                setattr(self.config, name, None)
        super().save_pretrained(save_directory, *args, **kwargs)


class NewLLMModel(NewLLMPreTrainedModel):
    """Embedding and blocks, without the vocabulary.

    >>> config = NewLLMConfig(vocab_size=50, model={"context_width": 8, "mlp_width": 8})
    >>> NewLLMModel(config)(torch.tensor([[3, 1, 4]])).last_hidden_state.shape
    torch.Size([1, 3, 256])
    """

    _tied_weights_keys = {"network.readout.weight": "network.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: NewLLMConfig) -> None:
        super().__init__(config)
        self.network = NewLLM(config.shape, config.vocab_size, config.stop_rule)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in."""
        assert isinstance(value, nn.Embedding)
        self.network.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read tokens and return features and the context that follows.

        Args:
            input_ids: token ids, `[B, T]`.
            attention_mask: 0 at padding, on either side, `[B, T]` or with columns for what is in
                the cache already; padding holds the context.
            inputs_embeds: rows of the embedding in place of ids, `[B, T, E]`; sequence scope only.
            cache: the context before the first position.
            use_cache: whether the context is returned.
            return_dict: whether a `NewLLMOutput` is returned, or a tuple.
            kwargs: of other models, not used.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("one of input_ids and inputs_embeds expected, got both or none")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        real = None
        if attention_mask is not None:
            real = attention_mask[:, -given.shape[1] :].bool()
        output = self.network(
            input_ids,
            None if cache is None else _context(cache),
            real=real,
            embedded=inputs_embeds,
        )
        if use_cache:
            cache = DynamicCache(config=self.config) if cache is None else cache
            _keep(cache, output.context)
        found = NewLLMOutput(last_hidden_state=output.features, cache=cache if use_cache else None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return found if return_dict else found.to_tuple()


def _context(cache: DynamicCache) -> Tensor | None:
    """Return the context in a cache, `[B, K, C]`; None where nothing was read yet."""
    layers: list[Any] = cache.layers
    if any(layer.recurrent_states[0] is None for layer in layers):
        return None
    return torch.stack([layer.recurrent_states[0] for layer in layers], dim=1)


def _keep(cache: DynamicCache, context: Tensor) -> None:
    """Write a context `[B, K, C]` into a cache, which transformers can reorder for beams."""
    layers: list[Any] = cache.layers
    for layer, part in zip(layers, context.unbind(dim=1), strict=True):
        layer.update_recurrent_state(part)
        layer.has_previous_state[0] = True


class NewLLMForCausalLM(NewLLMPreTrainedModel, GenerationMixin):
    """The language model: what `AutoModelForCausalLM` loads from a checkpoint's folder.

    >>> config = NewLLMConfig(vocab_size=50, model={"context_width": 8, "mlp_width": 8})
    >>> model = NewLLMForCausalLM(config).eval()
    >>> ids = torch.tensor([[3, 1, 4, 1]])
    >>> first = model(ids[:, :3])
    >>> second = model(ids[:, 3:], cache=first.cache)
    >>> torch.allclose(second.logits[:, 0], model(ids).logits[:, 3], atol=1e-5)
    True
    """

    _tied_weights_keys = {  # noqa: RUF012
        "model.network.readout.weight": "model.network.embedding.weight"
    }

    def __init__(self, config: NewLLMConfig) -> None:
        super().__init__(config)
        self.model = NewLLMModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the read-out to the vocabulary."""
        return self.model.network.readout

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another read-out in."""
        assert isinstance(new_embeddings, nn.Linear)
        self.model.network.readout = new_embeddings

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Leave the mask out after the prompt: what is generated is never padding."""
        inputs = GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)  # pyright: ignore
        if kwargs.get("use_cache") and not kwargs.get("is_first_iteration"):
            inputs["attention_mask"] = None
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Read tokens and return logits, the loss where labels are given, and the context.

        Args:
            input_ids: token ids, `[B, T]`.
            attention_mask: as in `NewLLMModel.forward`.
            inputs_embeds: as there.
            cache: as there.
            labels: token ids that are shifted inside, -100 where nothing counts, `[B, T]`.
            use_cache: as there.
            return_dict: whether a `NewLLMCausalLMOutput` is returned, or a tuple.
            logits_to_keep: the last so many positions, or those of a tensor; 0 is all.
            kwargs: of the loss, such as `num_items_in_batch`.
        """
        found = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.network.logits(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = NewLLMCausalLMOutput(loss=loss, logits=logits, cache=found.cache)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
