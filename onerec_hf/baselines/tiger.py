"""TIGER (Rajput et al. 2023, arXiv:2305.05065): a T5 that reads semantic IDs and writes the next one.

Shapes: **B** users, **T** encoder tokens, **L** levels, **K** beams, **N** items.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Adafactor, T5Config, T5ForConditionalGeneration

from ..models.beam_search import BeamSearch, search
from ..models.catalogue import Catalogue
from .t5_search import T5Beams
from .training import pad_right, recent_items, train_baseline, windows

_PAD = 0  # also starts the decoder, as in every T5


class TIGERModel(T5ForConditionalGeneration):
    """A T5; with `causal_items` also a learned bias of cross-attention for each distance, in items, to the target.

    T5's cross-attention knows no positions. A bidirectional encoder can mark the last item for it; one whose tokens
    never see what comes after them cannot.
    """

    def __init__(self, config: T5Config):
        super().__init__(config)
        if config.causal_items:
            self.item_distance = nn.Embedding(config.max_items + 1, config.num_heads)  # the last row: a user token
            nn.init.zeros_(self.item_distance.weight)


class TIGER:
    """An encoder-decoder over tokens [pad | level 1 | ... | level L | users]; `self.model` is a [`TIGERModel`].

    The encoder reads a user token and the semantic IDs of the last items, the decoder writes L codes. The paper's
    catalogue: three levels of 256 codes of an RQ-VAE and a level that tells apart items with the same codes (`onerec
    prepare --quantizer rqvae --collisions extra_level`); any other works as well. Defaults are the paper's sizes.
    Different: generation is always constrained to the catalogue, by the same search as our own models (the paper lets
    beams leave it and counts them as misses).

    Args:
        catalogue (`Catalogue`): semantic IDs of all items.
        num_user_tokens (`int`, defaults to 2000): user u has token `u mod num_user_tokens`; 0: no user token.
        hidden_size (`int`, defaults to 128): `d_model`.
        intermediate_size (`int`, defaults to 1024): `d_ff`.
        num_hidden_layers (`int`, defaults to 4): layers of the encoder, and as many of the decoder.
        num_attention_heads (`int`, defaults to 6), head_dim (`int`, defaults to 64): of every attention.
        max_length (`int`, defaults to 20): number of most recent history items the model sees.
        dropout (`float`, defaults to 0.1): T5's.
        causal_items (`bool`, defaults to `False`): the encoder's tokens see their own and earlier items alone, so that
            one pass of a history trains every target in it, which is several times cheaper; cross-attention has a bias
            for how many items back a token lies. False: as in the paper, both sides, and each target a sample of its
            own.
        num_beams (`int`, defaults to 50): K; at least the number of items asked for.
        seed (`int`, defaults to 0): of the initial weights.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        num_user_tokens: int = 2000,
        hidden_size: int = 128,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 6,
        head_dim: int = 64,
        max_length: int = 20,
        dropout: float = 0.1,
        causal_items: bool = False,
        num_beams: int = 50,
        seed: int = 0,
    ):
        config = T5Config(
            vocab_size=1 + sum(catalogue.codebook_sizes) + num_user_tokens,
            d_model=hidden_size,
            d_ff=intermediate_size,
            d_kv=head_dim,
            num_layers=num_hidden_layers,
            num_decoder_layers=num_hidden_layers,
            num_heads=num_attention_heads,
            dropout_rate=dropout,
            pad_token_id=_PAD,
            eos_token_id=None,
        )
        # the last three are ours: T5 ignores them, `save_pretrained` keeps them
        own = {"num_user_tokens": num_user_tokens, "causal_items": causal_items, "max_items": max_length}
        config.update({"decoder_start_token_id": _PAD, **own})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = TIGERModel(config).eval()
        self.training_log: list[dict[str, float]] = []
        self._set_catalogue(catalogue, num_beams)

    def _set_catalogue(self, catalogue: Catalogue, num_beams: int) -> None:
        self.catalogue, self.num_beams = catalogue, num_beams
        self.level_offsets = [1 + sum(catalogue.codebook_sizes[:level]) for level in range(catalogue.num_levels)]
        self.item_tokens = catalogue.semantic_ids.cpu().long() + torch.tensor(self.level_offsets)  # (N, L)

    @property
    def num_items(self) -> int:
        return self.catalogue.num_items

    @property
    def max_length(self) -> int:
        return self.model.config.max_items

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors`, `generation_config.json` and `catalogue.safetensors`."""
        self.model.save_pretrained(folder)
        self.catalogue.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, num_beams: int = 50) -> "TIGER":
        """Reads what `save_pretrained` wrote."""
        self = cls.__new__(cls)
        self.model = TIGERModel.from_pretrained(folder).eval()
        self.training_log = []
        self._set_catalogue(Catalogue.from_pretrained(folder), num_beams)
        return self

    def fit(
        self,
        histories: Iterable[Sequence[int]],
        users: Sequence[int] | None = None,
        *,
        validate: Callable[["TIGER"], float] | None = None,
        learning_rate: float = 0.01,
        **training,
    ) -> "TIGER":
        """Trains on every item of every history but the first, given the items before it.

        The optimizer is Adafactor, the default of T5X, with which the paper trains. Its steps are relative to the size
        of each weight, which is what T5's initial weights (embeddings of size 1, queries of size 1 / sqrt(d_model
        d_kv)) are made for: with one absolute step for all of them, AdamW learns several times slower.

        Args:
            histories (iterable of lists of `int`): item indices in time order, e.g. `dataset["train"]["history"]`.
            users (sequence of `int`, *optional*): their users, e.g. `dataset["train"]["user"]`; required with user
                tokens.
            validate: see `train_baseline`. It generates: a sample of the validation users is enough to choose an
                epoch.
            learning_rate (`float`, defaults to .01): relative to the size of a weight.
            training: `num_epochs`, `batch_size`, `patience`, `seed`, ... of `train_baseline`. The paper: batches of
                256, 200,000 steps, the first 10,000 at the full learning rate, which then falls with the inverse
                square root.
        """
        histories = [list(history) for history in histories]
        if users is None and self.model.config.num_user_tokens:
            raise ValueError("TIGER has user tokens: pass `users` as well, or set num_user_tokens=0.")
        users = [0] * len(histories) if users is None else users
        pairs = list(zip(users, histories, strict=True))
        if self.model.config.causal_items:
            rows = [
                {"user": user, "input_ids": window[:-1], "targets": window[1:]}
                for user, history in pairs
                for window in windows([history], self.max_length + 1)
            ]
        else:
            rows = [
                {"user": user, "input_ids": history[max(0, end - self.max_length) : end], "targets": [history[end]]}
                for user, history in pairs
                for end in range(1, len(history))
            ]
        adafactor = (Adafactor, {"scale_parameter": True, "relative_step": False, "warmup_init": False})
        train_baseline(
            self,
            rows,
            self._collate,
            self._loss,
            validate=validate,
            learning_rate=learning_rate,
            optimizer=adafactor,
            **training,
        )
        return self

    @torch.no_grad()
    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool = False) -> np.ndarray:
        """The k best items for each row of `examples` (`user` and `history`), `(B, k)`; -1 where the beams hold
        fewer.
        """
        if k > self.num_beams:
            raise ValueError(f"k={k} items need num_beams of at least {k}, it is {self.num_beams}.")
        recent, catalogue = recent_items(examples, self.max_length, "TIGER"), self.catalogue.to(self.model.device)
        allowed = None
        if exclude_seen:
            allowed = torch.ones(len(recent), self.num_items, dtype=torch.bool)
            for row, history in enumerate(examples["history"]):
                allowed[row, list(history)] = False
        inputs = self._encoder_inputs(examples.get("user"), recent)
        mask = inputs["attention_mask"].bool()[:, None, None]  # (B, 1, 1, T)
        if self.model.config.causal_items:
            last = torch.tensor([[len(items) - 1] for items in recent], device=mask.device)
            mask = self._distance_bias(last, mask.shape[-1]).masked_fill(~mask, torch.finfo(self.model.dtype).min)
        decoder = T5Beams(self.model, catalogue, self.level_offsets, self._encode(inputs), mask)
        found = search(decoder, BeamSearch(), catalogue, len(recent), self.num_beams, allowed)
        return catalogue.items_of(found["leaves"][:, :, 0], k, allowed_items=allowed).cpu().numpy()

    def _encoder_inputs(self, users: Sequence[int] | None, histories: list[list[int]]) -> dict[str, torch.Tensor]:
        rows = [self.item_tokens[history].flatten() for history in histories]
        if num_users := self.model.config.num_user_tokens:
            if users is None:
                raise ValueError(
                    "TIGER has user tokens: pass the column `user` beside `history`, or set num_user_tokens=0."
                )
            first = self.model.config.vocab_size - num_users
            rows = [torch.cat([torch.tensor([first + user % num_users]), row]) for user, row in zip(users, rows)]
        input_ids = pad_right(rows, _PAD).to(self.model.device)
        return {"input_ids": input_ids, "attention_mask": (input_ids != _PAD).long()}

    def _encode(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Encoder states (B, T, D)."""
        mask = inputs["attention_mask"]
        if self.model.config.causal_items:  # pads stand on the right, where no real token looks
            item = self._item_of_token(mask.shape[1])
            mask = self._mask(item[None, :] <= item[:, None])
        return self.model.encoder(inputs["input_ids"], attention_mask=mask).last_hidden_state

    def _item_of_token(self, length: int) -> torch.Tensor:
        """Which item of a history the encoder's tokens belong to; the user token is in front of the first."""
        in_front = int(self.model.config.num_user_tokens > 0)
        return (torch.arange(length, device=self.model.device) - in_front).div(
            self.catalogue.num_levels, rounding_mode="floor"
        )

    def _distance_bias(self, target: torch.Tensor, length: int) -> torch.Tensor:
        """Bias of cross-attention, (B, heads, queries, T), for queries whose last known item is `target` (B,
        queries).
        """
        item = self._item_of_token(length)
        distance = (target[..., None] - item).clamp(min=0).masked_fill(item < 0, self.max_length)
        return self.model.item_distance(distance).permute(0, 3, 1, 2)

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What attention adds to its scores, (1, 1, queries, keys)."""
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[None, None]

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self._encoder_inputs([row["user"] for row in rows], [row["input_ids"] for row in rows])
        labels = [self.item_tokens[row["targets"]].flatten() for row in rows]
        return inputs | {"labels": pad_right(labels, -100).to(self.model.device)}  # (B, targets * L)

    def _loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        labels, levels = batch["labels"], self.catalogue.num_levels
        place = torch.arange(labels.shape[1], device=labels.device)
        target, last = place // levels, batch["input_ids"].shape[1]
        # Each target starts anew behind a start token, and sees its own codes and, in the encoder, the items before
        # it.
        inputs = torch.where(place % levels == 0, _PAD, labels.roll(1, 1)).clamp(min=_PAD)
        own = (target[None, :] == target[:, None]) & (place[None, :] <= place[:, None])
        context = batch["attention_mask"]
        if self.model.config.causal_items:
            visible = self._item_of_token(last)[None, :] <= target[:, None]
            context = self._mask(visible) + self._distance_bias(target[None], last)
        logits = self.model(
            encoder_outputs=(self._encode(batch),),
            attention_mask=context,
            decoder_input_ids=inputs,
            decoder_attention_mask=self._mask(own),
        ).logits  # (B, targets * L, V)
        real = labels != -100
        return cross_entropy(logits[real], labels[real], reduction="sum"), int(real.sum())
