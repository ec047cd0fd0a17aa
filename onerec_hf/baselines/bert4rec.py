"""BERT4Rec (Sun et al. 2019, arXiv:1904.06690): a cloze test over items, as a configuration of transformers' BERT.

Shapes: **B** users, **T** positions, **N** items, **D** width.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from .sequence_model import SequenceModel
from .training import pad_right, recent_items, train_baseline, windows


class BERT4Rec(SequenceModel):
    """A BERT whose tokens are the N items, a mask and a pad; `self.model` is a plain `BertForMaskedLM`.

    Training masks a share of the items of a window and predicts them from both sides, by a softmax over all items;
    a recommendation is what stands under a mask behind the history.
    Different from the paper: positions count from the first item that the model sees (the paper pads on the left), and
    a history longer than the window gives several windows instead of overlapping ones.

    Args:
        num_items (`int`): N, the size of the catalogue.
        hidden_size (`int`, defaults to 64): D, as in the paper.
        num_hidden_layers (`int`, defaults to 2): blocks, as in the paper.
        num_attention_heads (`int`, defaults to 2): heads per block, as in the paper.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; 4 D if None, as in the paper.
        max_length (`int`, defaults to 50): positions, the mask behind the history included.
        dropout (`float`, defaults to 0.1): on embeddings, on the output of every sublayer and on attention weights.
        seed (`int`, defaults to 0): of the initial weights.
    """

    def __init__(
        self,
        num_items: int,
        *,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        intermediate_size: int | None = None,
        max_length: int = 50,
        dropout: float = 0.1,
        seed: int = 0,
    ):
        config = BertConfig(
            vocab_size=num_items + 2,  # items, mask, pad
            pad_token_id=num_items + 1,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size or 4 * hidden_size,
            max_position_embeddings=max_length,
            type_vocab_size=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = BertForMaskedLM(config).eval()
        self.training_log = []

    @property
    def num_items(self) -> int:
        return self.model.config.vocab_size - 2

    @classmethod
    def _load(cls, folder: str | Path) -> BertForMaskedLM:
        return BertForMaskedLM.from_pretrained(folder)

    def fit(
        self,
        histories: Iterable[Sequence[int]],
        *,
        validate: Callable[["BERT4Rec"], float] | None = None,
        mask_share: float = 0.2,
        last_item_share: float = 0.1,
        **training,
    ) -> "BERT4Rec":
        """Trains on windows whose masks are drawn anew in every epoch.

        Args:
            histories (iterable of lists of `int`): item indices in time order, e.g. `dataset["train"]["history"]`.
            validate: see `train_baseline`.
            mask_share (`float`, defaults to 0.2): share of a window's items that is masked, at least one of them. The
                paper chooses it per data set (0.2 to 0.6).
            last_item_share (`float`, defaults to 0.1): share of the windows with only the last item masked, which is
                what a recommendation looks like. The paper adds such samples without saying how many.
            training: `num_epochs`, `batch_size`, `learning_rate`, `patience`, `seed`, ... of `train_baseline`.
        """
        for name, share in (("mask_share", mask_share), ("last_item_share", last_item_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; a share lies between 0 and 1.")
        rows = [{"input_ids": window} for window in windows(histories, self.max_length)]

        def collate(features: list[dict]) -> dict[str, torch.Tensor]:
            return self._masked([row["input_ids"] for row in features], mask_share, last_item_share)

        train_baseline(self, rows, collate, self._softmax_loss, validate=validate, **training)
        return self

    def _queries(self, examples: dict[str, list]) -> tuple[list[list[int]], int]:
        recent = recent_items(examples, self.max_length - 1, "BERT4Rec")
        return [[*items, self.num_items] for items in recent], self.num_items + 1

    def _masked(self, rows: list[list[int]], mask_share: float, last_item_share: float) -> dict[str, torch.Tensor]:
        """`input_ids` (B, T) with masks, and `labels` (B, T): the item under a mask, elsewhere -100."""
        items = pad_right(rows, self.num_items + 1)
        real = items <= self.num_items
        lengths = real.sum(1, keepdim=True)
        # The round(share * length) positions, at least one, with the smallest random keys.
        keys = torch.rand(items.shape).masked_fill(~real, 2.0)
        masked = keys.argsort(1).argsort(1) < (mask_share * lengths).round().clamp(min=1)
        only_last = torch.arange(items.shape[1]) == lengths - 1
        masked = torch.where(torch.rand(len(items), 1) < last_item_share, only_last, masked)
        return {"input_ids": items.masked_fill(masked, self.num_items), "labels": items.masked_fill(~masked, -100)}

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = (input_ids != self.num_items + 1).long()
        return self.model.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state

    def _score_vectors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """BERT's own head (M, D + 1) and item vectors (N, D + 1), the bias as one column more."""
        head = self.model.cls.predictions
        hidden = head.transform(hidden)
        items = torch.cat([head.decoder.weight, head.bias.unsqueeze(1)], 1)[: self.num_items]
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1), items
