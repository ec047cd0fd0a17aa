"""Makes transformers know our models and our pipeline without importing what they need, which takes seconds.

A model class needs all of torch's and transformers' modelling code. So the Auto classes are given stand-ins as soon as
somebody imports them; the first stand-in that is used imports `onerec_hf.models`, which registers the real classes.
The pipeline is registered when transformers' own are imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

CONFIGS = {  # model type -> its config; `onerec_hf.models` registers the same ones
    "onerec": "OneRecConfig",
    "onerec_v1": "OneRecV1Config",
    "onerec_v2": "OneRecV2Config",
    "onerec_session_reward": "OneRecSessionRewardConfig",
    "onerec_p_score": "OneRecPScoreConfig",
}


class StandIn(type):
    """Metaclass of a class that knows its name, and asks the real one of that name in `onerec_hf.models` for
    everything else.
    """

    def real(cls) -> type:
        return getattr(importlib.import_module("onerec_hf.models"), cls.__name__)

    def __getattr__(cls, name):
        return getattr(cls.real(), name)

    def __call__(cls, *args, **kwargs) -> Any:
        return cls.real()(*args, **kwargs)


STAND_INS = {model_type: StandIn(name, (), {"__module__": "onerec_hf"}) for model_type, name in CONFIGS.items()}


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then` as soon as `module` has been imported by whomever."""

    def __init__(self, module: str, then: Callable[[], Any]):
        self.module, self.then = module, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_configs() -> None:
    """Our model types, for `AutoConfig` and the `AutoModel` classes."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for model_type, config in STAND_INS.items():
        AutoConfig.register(model_type, config, exist_ok=True)


def register_tokenizer() -> None:
    """Our tokenizer, which `AutoTokenizer` finds by its name, whatever the config."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    tokenizer = StandIn("SemanticIdTokenizer", (), {"__module__": "onerec_hf"})
    AutoTokenizer.register(STAND_INS["onerec_v2"], tokenizer_class=tokenizer, exist_ok=True)


def register_pipeline() -> None:
    """Our task, for `pipeline`."""
    importlib.import_module("onerec_hf.pipeline")


def register() -> None:
    """Called once, by `import onerec_hf`."""
    for module, then in (
        ("transformers.models.auto.configuration_auto", register_configs),
        ("transformers.models.auto.tokenization_auto", register_tokenizer),
        ("transformers.pipelines", register_pipeline),
    ):
        if module in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, AfterImport(module, then))
