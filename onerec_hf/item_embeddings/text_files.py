"""Text embeddings of many items: file by file, so that a killed run goes on and several processes share the work."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .embeddings import text_embeddings

MANIFEST = "texts.json"


def text_embedding_files(
    texts: Sequence[str],
    model_name_or_path: str | Path,
    folder: str | os.PathLike,
    *,
    rows_per_file: int = 100_000,
    shard: tuple[int, int] = (0, 1),
    **settings: Any,
) -> list[Path]:
    """
    [`text_embeddings`] in `.npy` files of `rows_per_file` texts each, for [`~semantic_ids.EmbeddingFiles`]. A file
    that is there is complete and is not made again.

    Args:
        folder: For the files, and for `texts.json`, which says what they are made of.
        shard: `(i, n)` makes the files i, i + n, i + 2n, ... alone; n processes or machines with one folder make all.
        settings: As [`text_embeddings`]'s.

    Returns:
        The paths of all files, in the order of the texts, those of other shards included: they may not be there yet.

    Raises:
        ValueError: The folder holds files of other texts, another model or other settings; a shard that is none.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard={index}/{count}: the first number counts from 0 to {count - 1}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {"model": str(model_name_or_path), "num_texts": len(texts), "rows_per_file": rows_per_file}
    made_of |= {name: str(value) for name, value in settings.items() if name in ("max_length", "dtype", "revision")}
    _check(folder / MANIFEST, made_of | {"texts": _fingerprint(texts)})
    number = -(-len(texts) // rows_per_file)
    paths = [folder / f"part-{part:05d}-of-{number:05d}.npy" for part in range(number)]
    for part in range(index, number, count):
        if not paths[part].is_file():
            own = texts[part * rows_per_file : (part + 1) * rows_per_file]
            _write(paths[part], text_embeddings(own, model_name_or_path, **settings))
    return paths


def _fingerprint(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _check(path: Path, made_of: dict[str, Any]) -> None:
    if not path.is_file():
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        partial.replace(path)
    known = json.loads(path.read_text(encoding="utf-8"))
    if different := sorted(name for name in known.keys() | made_of.keys() if known.get(name) != made_of.get(name)):
        raise ValueError(
            f"{path.parent} holds embeddings of another run: "
            + ", ".join(f"{name} {known.get(name)!r} there, {made_of.get(name)!r} here" for name in different)
            + ". Delete that folder, or name another."
        )


def _write(path: Path, rows: np.ndarray) -> None:
    """Whole or not at all: the name appears at the end."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, rows)
    partial.replace(path)


__all__ = ["text_embedding_files"]
