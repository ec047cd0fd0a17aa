"""What every test may ask for: the folder of the real data sets, or a skip where they are absent."""

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(int(os.environ.get("ONEREC_TEST_THREADS", "1")))
if torch.cuda.is_available():  # the tests of seeds and of resuming want the same bits
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)

if os.environ.get("ONEREC_TEST_UNALIGNED") == "1":  # what is loaded lies at other addresses than what was saved
    from transformers import PreTrainedModel

    from .numeric import unaligned

    _from_pretrained = PreTrainedModel.from_pretrained.__func__

    def _load_unaligned(cls, *args, **kwargs):
        found = _from_pretrained(cls, *args, **kwargs)
        return (unaligned(found[0]), found[1]) if isinstance(found, tuple) else unaligned(found)

    PreTrainedModel.from_pretrained = classmethod(_load_unaligned)

# What takes more than a few seconds: runs of recipes and trainers, other processes. `make test-fast` leaves these out.
SLOW = {
    *(
        "auto_classes",
        "baselines",
        "captions",
        "continue",
        "docs",
        "export",
        "grpo",
        "hub",
        "ipa",
        "leaderboard",
        "loop",
    ),
    *(
        "modeling_common",
        "modeling_platform",
        "modeling_reward",
        "more_baselines",
        "natural_serving",
        "packaging",
        "prepare_work",
        "presets",
        "recipe_checks",
        "recipe_dpo",
    ),
    *(
        "recipe_features",
        "recipe_reward",
        "recipe_tables",
        "recipes",
        "recipes_page",
        "recommender",
        "resume",
        "training_step",
        "several_processes",
    ),
    *("beam_search::test_decoding_is_one_graph", "moe::test_two_processes_count_together"),
}


# Files that take longest: they are begun first, so that no worker ends with one of them while the others are idle.
LONGEST = (
    *("resume", "loop", "recipes_page", "packaging", "export", "recipes", "leaderboard", "hub", "docs"),
    *("recipe_reward", "recipe_features", "recipe_dpo", "recipe_checks", "modeling_platform", "ipa", "grpo"),
)


def pytest_collection_modifyitems(items):
    for item in items:
        module, name = item.module.__name__.rpartition("test_")[2], getattr(item, "originalname", item.name)
        if {module, f"{module}::{name}"} & SLOW:
            item.add_marker(pytest.mark.slow)
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.module.__name__.rpartition("test_")[2], len(order)))


def pytest_collection_finish():
    gc.freeze()  # every training ends with a collection, which would look at all that was imported


_SHARED = Path(os.environ.get("ONEREC_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """Folder of one real data set (`amazon_beauty_2014`, ...); skips the calling test where it is absent."""
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not at {folder} (set ONEREC_SHARED_DATA)")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to; a pause before a retry takes no time."""
    import huggingface_hub

    from .loopback_hub import TOKEN, LoopbackHub

    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # of the functions, such as `file_exists`
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # one that is kept knows the old endpoint
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub
