"""Tell the Auto classes of transformers of our model, without importing transformers for it.

Where it is imported already they are told at once, otherwise when their modules are.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, final

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def announce() -> None:
    """Register `NewLLMConfig`, `NewLLMModel` and `NewLLMForCausalLM`; again does nothing.

    >>> announce()
    >>> from transformers import AutoConfig
    >>> AutoConfig.for_model("new_llm", vocab_size=50).num_hidden_layers
    2
    """
    if any(isinstance(finder, _Announcer) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Announcer())
    for name, tell in _TELL.items():
        if name in sys.modules:
            tell(sys.modules[name])


def _tell_configs(module: Any) -> None:
    from .configuration_new_llm import NewLLMConfig

    module.AutoConfig.register(NewLLMConfig.model_type, NewLLMConfig, exist_ok=True)
    NewLLMConfig.register_for_auto_class()


def _tell_models(module: Any) -> None:
    from .configuration_new_llm import NewLLMConfig
    from .modeling_new_llm import NewLLMForCausalLM, NewLLMModel

    for auto, model in (("AutoModel", NewLLMModel), ("AutoModelForCausalLM", NewLLMForCausalLM)):
        getattr(module, auto).register(NewLLMConfig, model, exist_ok=True)
        # what transformers saves loads without this package too: the code travels with it
        model.register_for_auto_class(auto)


_TELL: dict[str, Callable[[Any], None]] = {_CONFIGS: _tell_configs, _MODELS: _tell_models}


@final
class _Announcer(MetaPathFinder):
    """Finds those two modules as they are, and tells them once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec, with a word to it when it is loaded; None for others."""
        if fullname not in _TELL:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Told(spec.loader)
        return spec


@final
class _Told(Loader):
    """Another loader, and a word to the module when it has done its work."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _TELL[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        # `get_source` and the like, for tools that look at modules
        return getattr(self.loader, name)
