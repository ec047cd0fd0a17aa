"""OneRec for the Hugging Face ecosystem. `import onerec_hf` registers the models and the pipeline with
transformers.
"""

import importlib
from typing import TYPE_CHECKING

from ._registration import register
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .models import *  # noqa: F403
    from .onerec import OneRec as OneRec


def __getattr__(name):
    """The public names of `onerec_hf.models`, which is imported when the first of them is asked for, and `OneRec`."""
    if name == "OneRec":
        return importlib.import_module(".onerec", __name__).OneRec
    if not name.startswith("__") or name == "__all__":
        models = importlib.import_module(".models", __name__)
        public = ["OneRec", "__version__", *models.__all__]
        if name == "__all__":
            return public
        if name in public:
            return getattr(models, name)
        if name == "models":
            return models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__getattr__("__all__")})


register()
