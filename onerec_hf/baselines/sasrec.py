"""SASRec (Kang and McAuley 2018, arXiv:1808.09781): a causal transformer over items, as a configuration of GPT-2 or of
BERT.

The paper trains with binary cross-entropy and one negative per position; with a full softmax over the catalogue the
same model is a far stronger baseline (Klenitskiy and Vasilev 2023, arXiv:2309.07602), and with cosine scores it learns
in half the epochs (NISER: Gupta et al. 2019, arXiv:1909.04276). Both are the default here.
Shapes: **B** users, **T** positions of a history, **N** items, **D** width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, embedding, normalize
from transformers import AutoConfig, BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedModel

from .sequence_model import SequenceModel
from .training import pad_next_items, train_baseline, windows


class SASRec(SequenceModel):
    """A transformer of item indices with tied input and output embeddings; `self.model` is a plain `GPT2Model`.

    As in the paper: learned positions, layer norm before each sublayer, a feed-forward layer of width D with ReLU.
    Different: positions count from the first item that the model sees (the paper pads on the left), two heads instead
    of one, no scaling of input embeddings by sqrt(D), and a history longer than the window gives several windows.
    With `post_norm`, a causal `BertModel`: layer norm behind the embeddings and behind each sublayer, and GELU. That
    is the SASRec in the code of S3-Rec (Zhou et al. 2020, arXiv:2008.07873), whose numbers are the ones that papers
    cite.

    Args:
        num_items (`int`): N, the size of the catalogue.
        hidden_size (`int`, defaults to 64): D.
        num_hidden_layers (`int`, defaults to 2): number of blocks.
        num_attention_heads (`int`, defaults to 2): heads per block.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; D if None, as in the paper.
        max_length (`int`, defaults to 50): number of most recent history items the model sees.
        dropout (`float`, defaults to 0.5): on embeddings and on the output of every sublayer (the paper's value for
            its sparse data sets).
        attention_dropout (`float`, defaults to 0.0): on attention weights (in the paper the same as `dropout`).
        post_norm (`bool`, defaults to `False`): see above.
        temperature (`float`, *optional*, defaults to 0.07): an item's score is the cosine between the output and the
            item's embedding, divided by this; None for the dot product of the paper.
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
        dropout: float = 0.5,
        attention_dropout: float = 0.0,
        post_norm: bool = False,
        temperature: float | None = 0.07,
        seed: int = 0,
    ):
        sizes: dict[str, Any] = {
            "vocab_size": num_items,
            "max_position_embeddings": max_length,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "use_cache": False,
        }
        width = intermediate_size or hidden_size
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if post_norm:
                sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": attention_dropout}
                sizes |= {"is_decoder": True, "type_vocab_size": 1, "pad_token_id": None}  # a decoder is causal
                bert = BertConfig(**sizes, intermediate_size=width)
                self.model = BertModel(bert, add_pooling_layer=False).eval()
            else:
                sizes |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": attention_dropout}
                sizes |= {"activation_function": "relu", "bos_token_id": None, "eos_token_id": None}
                self.model = GPT2Model(GPT2Config(**sizes, n_inner=width)).eval()
        self.model.config.score_temperature = temperature  # ours: the model ignores it, `save_pretrained` keeps it
        self.training_log = []

    @classmethod
    def _load(cls, folder: str | Path) -> PreTrainedModel:
        if isinstance(AutoConfig.from_pretrained(folder), BertConfig):
            return BertModel.from_pretrained(folder, add_pooling_layer=False)
        return GPT2Model.from_pretrained(folder)

    def fit(
        self,
        histories: Iterable[Sequence[int]],
        *,
        validate: Callable[["SASRec"], float] | None = None,
        loss: str = "softmax",
        num_negatives: int = 512,
        negatives_count_as: float | None = 256.0,
        **training,
    ) -> "SASRec":
        """Trains on every position of every history: all targets of a user in one pass.

        Args:
            histories (iterable of lists of `int`): item indices in time order, e.g. `dataset["train"]["history"]`; a
                history longer than `max_length + 1` is cut into windows, so that no target is lost.
            validate: see `train_baseline`.
            loss (`str`, defaults to `"softmax"`): `"softmax"`, cross-entropy over all items; `"sampled_softmax"`,
                cross-entropy over the target and items drawn uniformly; or `"bce"`, the paper's binary cross-entropy
                with one negative per position (here uniform over all items but the target).
            num_negatives (`int`, defaults to 512): of the sampled softmax, items drawn for each batch. All positions
                of a batch share them; where one is the target, it is left out.
            negatives_count_as (`float`, *optional*, defaults to 256): how many items the drawn ones stand for in the
                softmax's sum, whatever their number: eSASRec (arXiv:2508.06450) draws 256 for each position and does
                not correct for it. None: all N, so that the sum is an unbiased estimate of the full softmax's.
            training: `num_epochs`, `batch_size`, `learning_rate`, `weight_average_decay`, `seed`, ... of
                `train_baseline`.
        """
        if num_negatives < 1 or (negatives_count_as is not None and negatives_count_as <= 0):
            raise ValueError(
                f"num_negatives={num_negatives} and negatives_count_as={negatives_count_as}: a sampled softmax draws "
                "at least one item, and the drawn ones stand for a positive number of items (None: for all)."
            )

        def sampled_softmax(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            return self._sampled_softmax_loss(batch, num_negatives, negatives_count_as or self.num_items)

        losses = {"softmax": self._softmax_loss, "sampled_softmax": sampled_softmax, "bce": self._bce_loss}
        if loss not in losses:
            raise ValueError(f"loss must be one of {', '.join(losses)}; got {loss!r}.")
        rows = [{"input_ids": window[:-1], "labels": window[1:]} for window in windows(histories, self.max_length + 1)]
        train_baseline(self, rows, pad_next_items, losses[loss], validate=validate, **training)
        return self

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids).last_hidden_state

    def _score_vectors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        items, temperature = self.model.get_input_embeddings().weight, self.model.config.score_temperature
        if temperature is None:
            return hidden, items
        return normalize(hidden, dim=-1) / temperature, normalize(items, dim=-1)

    def _sampled_softmax_loss(
        self, batch: dict[str, torch.Tensor], num_negatives: int, count_as: float
    ) -> tuple[torch.Tensor, int]:
        """Sum over positions of -log(e^s(target) / (e^s(target) + count_as / num_negatives * sum e^s(negative)))."""
        position = batch["labels"] != -100
        targets = batch["labels"][position]  # (M,)
        hidden, items = self._score_vectors(self._hidden(batch["input_ids"])[position])
        negatives = torch.randint(self.num_items, (num_negatives,), device=targets.device)
        # One look-up for both: the gradient of the table (N, D) is then made once.
        drawn = embedding(torch.cat([targets, negatives]), items)
        positive = (hidden * drawn[: len(targets)]).sum(-1, keepdim=True)  # (M, 1)
        logits = hidden @ drawn[len(targets) :].T + math.log(count_as / num_negatives)
        logits = logits.masked_fill(negatives == targets[:, None], -torch.inf)
        first = torch.zeros_like(targets)
        return cross_entropy(torch.cat([positive, logits], dim=1), first, reduction="sum"), len(targets)

    def _bce_loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        position = batch["labels"] != -100
        hidden, items = self._score_vectors(self._hidden(batch["input_ids"])[position])
        positive = batch["labels"][position]
        negative = (positive + torch.randint_like(positive, 1, self.num_items)) % self.num_items
        logits = (hidden * items[torch.stack([positive, negative])]).sum(-1)  # (2, M)
        truth = torch.zeros_like(logits)
        truth[0] = 1.0
        return binary_cross_entropy_with_logits(logits, truth, reduction="sum"), len(hidden)
