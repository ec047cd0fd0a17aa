"""Tokenizer of semantic IDs, in OpenOneRec's spelling (arXiv:2512.24762):
<|sid_begin|><s_a_12><s_b_7><s_c_255><|sid_end|>.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, TokenizersBackend
from transformers.utils.hub import cached_file

from .catalogue import CATALOGUE_NAME, Catalogue
from .configuration_onerec import NUM_SPECIAL_TOKENS

CONFIG_NAME = "tokenizer_config.json"
LEVEL_NAMES = "abcdefghijklmnopqrstuvwxyz"
_TOKEN = r"<[^<>\s]+>"


class SemanticIdTokenizer(TokenizersBackend):
    r"""
    A word-level tokenizer over the codes of every level, and exact arithmetic between items, codes and token ids.

    The vocabulary is `<|pad|> <|sid_begin|> <|sid_end|> <|unk|>`, then the codes of level 1, level 2, ...
    `<|sid_begin|>` is the BOS token in front of every generated item. Bulk work goes through `encode_items`, which
    never touches text.

    Args:
        vocab (`dict[str, int]`, *optional*): Token -> id. Made of the special tokens and `codebook_sizes` where it is
            left out, as it should be: the models count on that order. Saved tokenizers bring theirs.
        codebook_sizes (`list[int]`): Codes per level, 1 to 26 levels. Code 7 of level 1 is `<s_a_7>`, of level 2
            `<s_b_7>`, ...; its id is 7 plus `level_offsets` of the level.
        pad_token (`str`, defaults to `"<|pad|>"`): Id 0; fills histories and targets.
        bos_token (`str`, defaults to `"<|sid_begin|>"`): Id 1, in front of an item. Text is encoded without it.
        eos_token (`str`, defaults to `"<|sid_end|>"`): Id 2, behind an item in text.
        unk_token (`str`, defaults to `"<|unk|>"`): Id 3, for `<...>` in a text that is no token; other text is left
            out.
        catalogue (`Catalogue`, *optional*): The items; needed by `encode_items` and `decode_items`, saved with the
            tokenizer.
    """

    model_input_names = ["input_ids", "attention_mask"]
    model = models.WordLevel  # type: ignore[assignment]

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        codebook_sizes: Sequence[int] | None = None,
        pad_token: str = "<|pad|>",
        bos_token: str = "<|sid_begin|>",
        eos_token: str = "<|sid_end|>",
        unk_token: str = "<|unk|>",
        catalogue: Catalogue | None = None,
        **kwargs,
    ):
        if codebook_sizes is None:
            raise ValueError(
                "codebook_sizes is missing: give the codes per level, as `SemanticIdTokenizer(codebook_sizes=[256, "
                "256, 256])`; a model's are `model.config.codebook_sizes`."
            )
        codebook_sizes = [int(size) for size in codebook_sizes]
        if not 1 <= len(codebook_sizes) <= len(LEVEL_NAMES):
            raise ValueError(f"codebook_sizes={codebook_sizes}: a semantic ID has 1 to {len(LEVEL_NAMES)} levels.")
        if vocab is None:
            vocab = {str(token): i for i, token in enumerate([pad_token, bos_token, eos_token, unk_token])}
            for name, size in zip(LEVEL_NAMES, codebook_sizes):
                vocab.update({f"<s_{name}_{code}>": len(vocab) + code for code in range(size)})
        self._tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=str(unk_token)))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="removed", invert=True)
        self._tokenizer.decoder = decoders.Fuse()
        super().__init__(
            codebook_sizes=codebook_sizes,
            pad_token=pad_token,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            **kwargs,
        )
        self.codebook_sizes = codebook_sizes
        self.level_offsets = NUM_SPECIAL_TOKENS + np.concatenate([[0], np.cumsum(codebook_sizes)[:-1]]).astype(
            np.int64
        )
        self.catalogue = catalogue

    def __call__(self, text: Any = None, *args: Any, items: Any = None, **kwargs: Any) -> BatchEncoding:
        """
        Text of semantic IDs as every tokenizer takes it; or, with `items`, histories of item ids as the models take
        them.

        Args:
            items (`list[list]` or `list`, *optional*): Histories of item ids, oldest first, or a single one.
                `padding`, `truncation` (the newest `max_length` items stay), `max_length` and `return_tensors`
                (`"pt"`, `"np"`) as for text.

        Returns:
            [`BatchEncoding`]. Of `items`: `context_ids` (B, T, L) and `context_mask` (B, T), padded on the right;
            nested lists without `return_tensors`, and without the B of a single history.

        Raises:
            ValueError: For item ids given as text, and for histories of unequal length in tensors without padding.
                KeyError: For ids that the catalogue does not have.
        """
        if items is not None:
            if text is not None or args:
                raise ValueError("text and items are given: a call encodes one of the two.")
            return self._encode_histories(items, **kwargs)
        first = next((one for one in ([text] if isinstance(text, str) else text or ()) if one not in ("", None)), None)
        if isinstance(first, (int, np.integer)) or (
            isinstance(first, str) and first.strip() and not re.search(_TOKEN, first)
        ):
            raise ValueError(
                f"{first!r} is no text of semantic IDs, such as '<s_a_12><s_b_7><s_c_255>'. For item ids call "
                "`tokenizer(items=[[...], [...]], padding=True, return_tensors='pt')`, which gives context_ids and "
                "context_mask, or `tokenizer.encode_items(item_ids)`."
            )
        return super().__call__(text, *args, **kwargs)

    def _encode_histories(
        self,
        items: Any,
        padding: Any = False,
        truncation: Any = False,
        max_length: Any = None,
        return_tensors: Any = None,
    ) -> BatchEncoding:
        histories = list(items)
        one = (
            not histories
            or isinstance(histories[0], str)
            or not getattr(histories[0], "shape", hasattr(histories[0], "__len__"))
        )
        histories = [histories] if one else [list(history) for history in histories]
        if (truncation or padding == "max_length") and max_length is None:
            raise ValueError(f"truncation={truncation!r}, padding={padding!r}: say to how many items, max_length=...")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r}: allowed are 'pt', 'np' and None.")
        if truncation:
            histories = [history[-max_length:] for history in histories]
        lengths = [len(history) for history in histories]
        width = max(max_length if padding == "max_length" else 0, *lengths)
        if return_tensors and not padding and len(set(lengths)) > 1:
            raise ValueError(f"histories of {min(lengths)} to {max(lengths)} items are no tensor: pass padding=True.")
        ids = [
            np.full((width if padding else length, len(self.codebook_sizes)), self.pad_token_id) for length in lengths
        ]
        for row, history in zip(ids, histories):
            row[: len(history)] = self.encode_items(history) if history else 0
        mask = [np.arange(len(row)) < length for row, length in zip(ids, lengths)]
        if return_tensors:
            arrays = {"context_ids": np.stack(ids), "context_mask": np.stack(mask)}
            return BatchEncoding(arrays, tensor_type=return_tensors)
        lists = {"context_ids": [row.tolist() for row in ids], "context_mask": [row.tolist() for row in mask]}
        return BatchEncoding({name: rows[0] if one else rows for name, rows in lists.items()})

    def encode_semantic_ids(self, semantic_ids: ArrayLike) -> np.ndarray:
        """Codes (..., L) -> token ids (..., L), int64."""
        codes = np.asarray(semantic_ids)
        sizes = np.asarray(self.codebook_sizes)
        if codes.shape[-1] != len(sizes) or (codes < 0).any() or (codes >= sizes).any():
            raise ValueError(f"semantic IDs of shape {codes.shape} do not fit codebook_sizes={self.codebook_sizes}.")
        return codes + self.level_offsets

    def decode_semantic_ids(self, token_ids: ArrayLike) -> np.ndarray:
        """Token ids (..., L) -> codes (..., L); -1 where a token is not a code of its level."""
        codes = np.asarray(token_ids) - self.level_offsets
        return np.where((codes >= 0) & (codes < np.asarray(self.codebook_sizes)), codes, -1)

    def encode_items(self, item_ids: ArrayLike) -> np.ndarray:
        """
        Token ids of items, given by their original ids.

        Args:
            item_ids (array of shape (...)): Ids known to the catalogue.

        Returns:
            `np.ndarray` int64 of shape (..., L).

        Raises:
            ValueError: Without a catalogue, and for lists of unequal length. KeyError: For unknown ids, naming the
                first.
        """
        catalogue = self._require_catalogue()
        if isinstance(item_ids, (list, tuple)) and all(isinstance(row, (list, tuple, np.ndarray)) for row in item_ids):
            if len(lengths := {len(row) for row in item_ids}) > 1:
                raise ValueError(
                    f"the lists hold {min(lengths)} to {max(lengths)} item ids, which is no array. For histories call "
                    "`tokenizer(items=[[...], [...]], padding=True, return_tensors='pt')`."
                )
        return catalogue.semantic_ids.cpu().numpy()[catalogue.index_of(item_ids)] + self.level_offsets

    def decode_items(self, token_ids: Any) -> list[list]:
        """
        Original ids of the items behind token ids.

        Args:
            token_ids: Of shape (S, L); or what `generate` returns, of shape (S, m * (1 + L)), with BOS before each
                item.

        Returns:
            A list per semantic ID, S or S * m of them: the popular item first where several share it, empty where the
            codes belong to no item.

        Raises:
            ValueError: For codes that lack `level_offsets`, and for another number of columns.
        """
        catalogue = self._require_catalogue()
        tokens = self._without_bos(token_ids)
        codes = self.decode_semantic_ids(tokens)
        real = tokens[(tokens != self.pad_token_id).any(1)]
        plain = len(real) and ((real >= 0) & (real < np.asarray(self.codebook_sizes))).all()
        if plain and (self.decode_semantic_ids(real) < 0).any(1).all():
            raise ValueError(
                f"{real[0].tolist()} are codes and no token ids: call "
                "`tokenizer.decode_items(tokenizer.encode_semantic_ids(codes))`."
            )
        return [catalogue.item_ids[items].tolist() for items in catalogue.items_with(codes)]

    def _without_bos(self, token_ids: Any) -> np.ndarray:
        """Token ids (S, L) of each item, of these or of what `generate` returns."""
        token_ids = getattr(token_ids, "sequences", token_ids)  # with return_dict_in_generate=True
        tokens = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else np.asarray(token_ids)
        levels = len(self.codebook_sizes)
        if tokens.shape[-1] != levels and tokens.shape[-1] % (levels + 1) == 0:
            rows = tokens.reshape(-1, levels + 1)
            if np.isin(rows[:, 0], (self.bos_token_id, self.pad_token_id)).all():
                return rows[:, 1:]
        if tokens.dtype.kind not in "iu" or tokens.shape[-1] != levels:
            raise ValueError(
                f"token_ids are {tokens.dtype} of shape {tokens.shape}: expected integers of shape (items, {levels}), "
                f"or what `generate` returns, {levels + 1} columns for each item with {self.bos_token} first."
            )
        return tokens.reshape(-1, levels)

    def _require_catalogue(self) -> Catalogue:
        if self.catalogue is None:
            raise ValueError(
                "this tokenizer has no catalogue, so it knows codes but no items. Set `tokenizer.catalogue = "
                f"Catalogue(...)`, or load it from a folder that holds {CATALOGUE_NAME}."
            )
        if self.catalogue.codebook_sizes != self.codebook_sizes:
            raise ValueError(
                f"the catalogue has codebook_sizes={self.catalogue.codebook_sizes}, the tokenizer "
                f"{self.codebook_sizes}: they come from different semantic IDs."
            )
        return self.catalogue

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As `PreTrainedTokenizerBase.save_pretrained`, plus `catalogue.safetensors` where there is a catalogue."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        if self.catalogue is not None:
            self._require_catalogue().save_pretrained(save_directory)
        return files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs
    ) -> "SemanticIdTokenizer":
        """
        As `PreTrainedTokenizerBase.from_pretrained`; attaches the repository's catalogue when it holds one. A
        repository without files of a tokenizer has that of its model's `codebook_sizes`.
        """
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in names if kwargs.get(name)}

        def file(name: str) -> str | None:
            return cached_file(
                str(pretrained_model_name_or_path), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs
            )

        if file(CONFIG_NAME) is None and (path := file("config.json")) is not None:
            sizes = json.loads(Path(path).read_text(encoding="utf-8")).get("codebook_sizes")
            kwargs = {"codebook_sizes": sizes} | kwargs
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if file(CATALOGUE_NAME) is not None:
            tokenizer.catalogue = Catalogue.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        return tokenizer


def saved_codebook_sizes(folder: str | os.PathLike) -> list[int] | None:
    """Codes per level of the tokenizer that a folder holds; None where there is none, or one of another kind."""
    path = Path(folder) / CONFIG_NAME
    return json.loads(path.read_text(encoding="utf-8")).get("codebook_sizes") if path.is_file() else None


__all__ = ["SemanticIdTokenizer", "saved_codebook_sizes"]
