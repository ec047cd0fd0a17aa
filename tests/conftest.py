"""What every test may ask for: the folder of the real data sets, or a skip where they are absent."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
torch.set_num_threads(1)

_SHARED = Path(os.environ.get("ONEREC_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """Folder of one real data set (`amazon_beauty_2014`, ...); skips the calling test where it is absent."""
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not at {folder} (set ONEREC_SHARED_DATA)")
    return folder
