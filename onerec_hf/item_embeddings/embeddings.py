"""Item embeddings (N, D) to make semantic IDs from: text encoders, co-occurrence, files, and their concatenation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from .ppmi import PPMI, PairCounts

logger = logging.get_logger(__name__)


def item_texts(items: Mapping[str, Sequence], fields: Sequence[str], separator: str = ". ") -> list[str]:
    """One text per item: its values of `fields` in this order, without those that are null, NaN or empty.

    Args:
        items: `Interactions.items`, or any mapping of names to N values.
    """
    if absent := [name for name in fields if name not in items]:
        raise ValueError(f"items has no {absent}; it has {list(items)}")
    rows = zip(*(items[name] for name in fields))
    return [separator.join(str(value) for value in row if not _absent(value)) for row in rows]


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value))) or value == ""


@torch.no_grad()
def text_embeddings(
    texts: Sequence[str],
    model_name_or_path: str | Path,
    *,
    batch_size: int = 64,
    max_length: int = 64,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **from_pretrained_kwargs,
) -> np.ndarray:
    """Embeds texts with any encoder of the Hub: mean of the last hidden states over the attention mask.

    Args:
        texts: N texts, none empty.
        model_name_or_path: what `AutoModel` and `AutoTokenizer` take; of an encoder-decoder (T5) only the encoder
            runs. A tokenizer without padding token pads with its end-of-text token, which the mask leaves out.
        batch_size: texts per forward pass; batches hold texts of similar length, longest first.
        max_length: tokens per text; the rest is cut off.
        device: default: `"cuda"` where there is one, otherwise `"cpu"`.
        dtype: of the weights; pooling is in float32.
        from_pretrained_kwargs: to both `from_pretrained`: `local_files_only`, `revision`, `trust_remote_code`, ...

    Returns:
        `np.ndarray` of shape (N, D), float32, not normalised.

    Raises:
        ValueError: no texts, or empty ones.
    """
    if empty := [row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]:
        raise ValueError(
            f"{len(empty)} of {len(texts)} texts are empty or not strings, first rows {empty[:5]}; give every item a "
            "text, such as its category or id"
        )
    if not len(texts):
        raise ValueError("texts is empty")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **from_pretrained_kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModel.from_pretrained(model_name_or_path, dtype=dtype, **from_pretrained_kwargs)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model.to(device).eval()

    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    embeddings = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in logging.tqdm(range(0, len(texts), batch_size), desc="text embeddings", unit="batch"):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()  # (B, T, 1)
        embeddings[rows] = ((hidden.float() * mask).sum(1) / mask.sum(1)).cpu().numpy()  # (B, D)
    return embeddings


def collaborative_embeddings(
    histories: datasets.Dataset | Iterable[datasets.Dataset] | Iterable[Sequence[int]],
    num_items: int,
    dim: int = 128,
    *,
    window: int = 5,
    num_iterations: int = 8,
    seed: int = 0,
    folder: str | Path | None = None,
) -> np.ndarray:
    """Item embeddings from co-occurrence: truncated SVD of the PPMI matrix (Levy and Goldberg, NeurIPS 2014).

    Two different items at distance d <= `window` in a history co-occur with weight 1 / d, in both directions. With
    C_ij the sum of these weights, C_i and C_j its row sums and C its total, M_ij = max(0, log(C_ij C / (C_i C_j))).
    M stays sparse; its leading singular vectors come from randomised subspace iteration (Halko, Martinsson and Tropp,
    arXiv:0909.4061, algorithm 4.4).

    Args:
        histories: the `train` split (its `history` is read), such sets one after the other, or sequences of item
            indices in time order. Training events only: what is evaluated must not be in it.
        num_items: N.
        dim: D, at most N.
        window: greatest distance that counts, at least 1. Space on disk grows with events x window, memory does not.
        num_iterations: of the subspace iteration; 8 reach 96% of the exact squared singular values on Amazon Beauty.
        seed: of the random start.
        folder: for pairs that do not fit into memory; default: a temporary one.

    Returns:
        `np.ndarray` of shape (N, D), float32: U_ik sigma_k, the rows of M projected on the leading singular vectors.
        Rows of items that are in no history, or co-occur with none more than by chance, are **zero**.

    Raises:
        ValueError: an item index outside 0..N-1, `dim` above N, or no co-occurrence at all.
    """
    if not 1 <= dim <= num_items:
        raise ValueError(f"dim must lie in 1..num_items = {num_items}, got {dim}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    with nullcontext(folder) if folder else TemporaryDirectory() as work:
        counts = PairCounts(num_items, window, Path(work))
        for items, lengths in _flatten(histories):
            counts.add(items, lengths)
        matrix = PPMI(counts, Path(work))
        if unseen := int((~matrix.seen).sum()):
            logger.warning(
                f"{unseen} of {num_items} items co-occur with no other more than by chance: zero embeddings"
            )
        embeddings = _leading_vectors(matrix, dim, num_iterations, seed)
    embeddings[~matrix.seen] = 0
    return embeddings


def _leading_vectors(matrix: PPMI, dim: int, num_iterations: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    size = matrix.num_items
    basis = torch.randn(size, min(size, dim + 32), generator=generator)  # 32 more than wanted: oversampling
    for _ in logging.tqdm(range(num_iterations), desc="co-occurrence", unit="pass"):
        basis = torch.linalg.qr(matrix.multiply(basis)).Q
    # M is symmetric: its singular values are the absolute eigenvalues
    values, vectors = torch.linalg.eigh(basis.T @ matrix.multiply(basis))
    largest = values.abs().argsort(descending=True)[:dim]
    return (basis @ (vectors[:, largest] * values[largest].abs())).numpy()


def _flatten(
    histories: datasets.Dataset | Iterable[datasets.Dataset] | Iterable[Sequence[int]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Histories in parts: per part all one after another (M,), and the length of each."""
    if isinstance(histories, datasets.Dataset):
        column = histories.with_format("arrow")[:]["history"]
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        yield column.flatten().to_numpy(), column.value_lengths().to_numpy()
        return
    own: list[np.ndarray] = []
    for each in histories:
        if isinstance(each, datasets.Dataset):
            yield from _flatten(each)
        else:
            own.append(np.asarray(each, dtype=np.int64))
    if own:
        yield np.concatenate(own), np.array([len(history) for history in own])


def concat_embeddings(
    *parts: np.ndarray, weights: Sequence[float] | None = None, means: np.ndarray | None = None
) -> np.ndarray:
    """Joins several embeddings of the same items so that each has the same say, whatever its scale and width.

    Each part is centred, its rows are divided by their length and multiplied by its weight (default 1). A row equal
    to the mean of its part stays zero.

    Args:
        parts: `np.ndarray` of shape (N, D_p) each.
        means (`np.ndarray` of shape (sum of D_p,), *optional*): What is subtracted; default the mean of these items.
            For items that join others: the mean of those, side by side for all parts.

    Returns:
        `np.ndarray` of shape (N, sum of D_p), float32.

    Raises:
        ValueError: parts of different N, weights that are not one per part, or means of another width.
    """
    if weights is None:
        weights = [1.0] * len(parts)
    if not parts or len(weights) != len(parts):
        raise ValueError(f"need at least one part and one weight per part, got {len(parts)} and {len(weights)}")
    scaled, ends = [], np.cumsum([part.shape[1] for part in parts])
    if means is not None and len(means) != ends[-1]:
        raise ValueError(f"the embeddings have {ends[-1]} columns, the means {len(means)}: take the same embeddings.")
    for part, weight, end in zip(parts, weights, ends):
        centred = check_item_embeddings(part, len(parts[0]))
        centred = centred - (centred.mean(0) if means is None else means[end - part.shape[1] : end])
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        scaled.append(weight * centred / np.where(length > 0, length, 1))
    return np.concatenate(scaled, axis=1, dtype=np.float32)


def load_embeddings(path: str | Path, num_items: int, tensor_name: str | None = None) -> np.ndarray:
    """Reads item embeddings from `.npy` or `.safetensors`, checked by [`check_item_embeddings`].

    Row i must belong to `Interactions.item_ids[i]`.

    Args:
        path: a `.npy` file with a matrix (N, D) of numbers, or a `.safetensors` file with such a tensor, of any type.
        num_items: N.
        tensor_name: which tensor of a `.safetensors` file; may be left out where it holds one.

    Returns:
        `np.ndarray` of shape (N, D), float32.

    Raises:
        ValueError: another suffix, a tensor that the file does not have or several without a name, a shape other than
            (N, D), NaN or infinite values. FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return check_item_embeddings(np.load(path, allow_pickle=False), num_items)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot read {path}: pass a .npy or .safetensors file")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if tensor_name not in names and not (tensor_name is None and len(names) == 1):
            raise ValueError(f"{path} holds {names}; pass one of them as tensor_name, got {tensor_name!r}")
        return check_item_embeddings(file.get_tensor(tensor_name or names[0]).float().numpy(), num_items)


def check_item_embeddings(embeddings: np.ndarray, num_items: int) -> np.ndarray:
    """Item embeddings as float32 if they are a finite matrix with one row per item, otherwise an error.

    Raises:
        ValueError: not of shape (N, D), or rows with NaN or infinite values.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != num_items:
        raise ValueError(
            f"item embeddings must have shape (num_items = {num_items}, D), got {embeddings.shape}; row i belongs to "
            "interactions.item_ids[i], also after k_core()"
        )
    if bad := int((~np.isfinite(embeddings)).any(1).sum()):
        raise ValueError(f"{bad} of {num_items} item embeddings have NaN or infinite values; all items need a vector")
    return embeddings.astype(np.float32, copy=False)
