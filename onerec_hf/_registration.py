"""Makes transformers know our models and our pipeline without importing what they need, which takes seconds.

A model class needs all of torch's and transformers' modelling code. So the Auto classes are given stand-ins; the first one that is
used imports `onerec_hf.models`, which registers the real classes. The pipeline is registered when transformers' own are imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from transformers import AutoConfig, AutoTokenizer

CONFIGS = {  # model type -> its config; `onerec_hf.models` registers the same ones
    "onerec": "OneRecConfig",
    "onerec_v1": "OneRecV1Config",
    "onerec_v2": "OneRecV2Config",
    "onerec_session_reward": "OneRecSessionRewardConfig",
    "onerec_p_score": "OneRecPScoreConfig",
}


class StandIn(type):
    """Metaclass of a class that knows its name, and asks the real one of that name in `onerec_hf.models` for everything else."""

    def real(cls) -> type:
        return getattr(importlib.import_module("onerec_hf.models"), cls.__name__)

    def __getattr__(cls, name):
        return getattr(cls.real(), name)

    def __call__(cls, *args, **kwargs) -> Any:
        return cls.real()(*args, **kwargs)


class AfterImport(importlib.abc.MetaPathFinder):
    """Imports `then` as soon as `module` has been imported by whomever."""

    def __init__(self, module: str, then: str):
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
            importlib.import_module(self.then)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Called once, by `import onerec_hf`."""
    for model_type, name in CONFIGS.items():
        config = StandIn(name, (), {"__module__": "onerec_hf"})
        AutoConfig.register(model_type, config, exist_ok=True)
    tokenizer = StandIn("SemanticIdTokenizer", (), {"__module__": "onerec_hf"})
    AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)  # found by its name, whatever the config
    if "transformers.pipelines" in sys.modules:
        importlib.import_module("onerec_hf.pipeline")
    else:
        sys.meta_path.insert(0, AfterImport("transformers.pipelines", then="onerec_hf.pipeline"))
