"""Preference pairs on disk: a `datasets` set and its settings, complete or absent."""

import json
import os
import shutil
from pathlib import Path

import datasets

_METADATA = "pairs.json"


def save_rows(rows: list[dict], folder: Path, metadata: dict) -> None:
    """Writes rows as a `datasets` set and its metadata, complete or not at all: the folder appears under its name at the end."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    datasets.Dataset.from_list(rows).save_to_disk(str(unfinished))
    (unfinished / _METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def load_rows(folder: Path, metadata: dict) -> datasets.Dataset:
    """
    Reads what [`save_rows`] wrote.

    Raises:
        ValueError: When it is not there, or was made with other settings.
    """
    if not folder.is_dir():
        raise ValueError(
            f"the run continues inside an iteration, but its pairs are not at {folder}: keep them beside the checkpoints, or "
            "resume from a checkpoint at the end of an iteration."
        )
    found = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    if different := sorted(name for name in metadata if found.get(name) != metadata[name]):
        raise ValueError(
            f"the pairs in {folder} were made with other settings: "
            + ", ".join(f"{name}={found.get(name)!r}, now {metadata[name]!r}" for name in different)
            + ". Resume with the settings of the interrupted run."
        )
    return datasets.load_from_disk(str(folder))


__all__ = ["load_rows", "save_rows"]
