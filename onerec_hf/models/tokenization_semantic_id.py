"""Tokenizer of semantic IDs, in OpenOneRec's spelling (arXiv:2512.24762): <|sid_begin|><s_a_12><s_b_7><s_c_255><|sid_end|>."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import TokenizersBackend
from transformers.utils.hub import cached_file

from .catalogue import CATALOGUE_NAME, Catalogue
from .configuration_onerec import NUM_SPECIAL_TOKENS

CONFIG_NAME = "tokenizer_config.json"
LEVEL_NAMES = "abcdefghijklmnopqrstuvwxyz"


class SemanticIdTokenizer(TokenizersBackend):
    r"""
    A word-level tokenizer over the codes of every level, and exact arithmetic between items, codes and token ids.

    The vocabulary is `<|pad|> <|sid_begin|> <|sid_end|> <|unk|>`, then the codes of level 1, level 2, ... `<|sid_begin|>` is the
    BOS token in front of every generated item. Bulk work goes through `encode_items`, which never touches text.

    Args:
        codebook_sizes (`list[int]`): Codes per level.
        catalogue (`Catalogue`, *optional*): The items; needed by `encode_items` and `decode_items`, saved with the tokenizer.
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
                "codebook_sizes is missing: give the codes per level, as `SemanticIdTokenizer(codebook_sizes=[256, 256, 256])`; a "
                "model's are `model.config.codebook_sizes`."
            )
        codebook_sizes = [int(size) for size in codebook_sizes]
        if not 1 <= len(codebook_sizes) <= len(LEVEL_NAMES):
            raise ValueError(f"codebook_sizes={codebook_sizes}: a semantic ID has 1 to {len(LEVEL_NAMES)} levels.")
        if vocab is None:
            vocab = {str(token): i for i, token in enumerate([pad_token, bos_token, eos_token, unk_token])}
            for name, size in zip(LEVEL_NAMES, codebook_sizes):
                vocab.update({f"<s_{name}_{code}>": len(vocab) + code for code in range(size)})
        self._tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token=str(unk_token)))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^<>\s]+>"), behavior="removed", invert=True)
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
            ValueError: Without a catalogue. KeyError: For unknown ids, naming the first.
        """
        catalogue = self._require_catalogue()
        return catalogue.semantic_ids.cpu().numpy()[catalogue.index_of(item_ids)] + self.level_offsets

    def decode_items(self, token_ids: ArrayLike) -> list[list]:
        """
        Original ids of the items behind token ids (S, L): a list per row, the popular one first where items share a semantic ID,
        empty where the codes belong to no item.
        """
        catalogue = self._require_catalogue()
        codes = self.decode_semantic_ids(token_ids).reshape(-1, len(self.codebook_sizes))
        found = catalogue.items_with(codes)
        return [catalogue.item_ids[items].tolist() for items in found]

    def _require_catalogue(self) -> Catalogue:
        if self.catalogue is None:
            raise ValueError(
                "this tokenizer has no catalogue, so it knows codes but no items. Set `tokenizer.catalogue = Catalogue(...)`, or "
                f"load it from a folder that holds {CATALOGUE_NAME}."
            )
        if self.catalogue.codebook_sizes != self.codebook_sizes:
            raise ValueError(
                f"the catalogue has codebook_sizes={self.catalogue.codebook_sizes}, the tokenizer {self.codebook_sizes}: they come "
                "from different semantic IDs."
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
        As `PreTrainedTokenizerBase.from_pretrained`; attaches the repository's catalogue when it holds one. A repository without
        files of a tokenizer has that of its model's `codebook_sizes`.
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
