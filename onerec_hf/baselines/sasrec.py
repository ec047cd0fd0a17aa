"""SASRec (Kang and McAuley 2018, arXiv:1808.09781): a causal transformer over items, as a configuration of GPT-2.

The paper trains with binary cross-entropy and one negative per position; with a full softmax over the catalogue the
same model is a far stronger baseline (Klenitskiy and Vasilev 2023, arXiv:2309.07602), and with cosine scores it learns
in half the epochs (NISER: Gupta et al. 2019, arXiv:1909.04276). Both are the default here.
Shapes: **B** users, **T** positions of a history, **N** items, **D** width.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers import GPT2Config, GPT2Model, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from .ranking import rank_items
from .softmax_loss import FullSoftmaxLoss

logger = logging.get_logger(__name__)


class SASRec:
    """A GPT-2 of item indices with tied input and output embeddings; `self.model` is a plain `GPT2Model`.

    As in the paper: learned positions, layer norm before each sublayer, a feed-forward layer of width D with ReLU.
    Different: positions count from the first item that the model sees (the paper pads on the left), two heads instead
    of one, no scaling of input embeddings by sqrt(D), and a history longer than the window gives several windows.

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
        temperature: float | None = 0.07,
        seed: int = 0,
    ):
        config = GPT2Config(
            vocab_size=num_items,
            n_positions=max_length,
            n_embd=hidden_size,
            n_layer=num_hidden_layers,
            n_head=num_attention_heads,
            n_inner=intermediate_size or hidden_size,
            activation_function="relu",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=attention_dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        config.update({"score_temperature": temperature})  # ours: GPT-2 ignores it, `save_pretrained` keeps it
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = GPT2Model(config).eval()
        self.training_log: list[dict[str, float]] = []

    @property
    def num_items(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.model.config.n_positions

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SASRec":
        """Reads what `save_pretrained` wrote."""
        self = cls.__new__(cls)
        self.model = GPT2Model.from_pretrained(folder).eval()
        self.training_log = []
        return self

    def fit(
        self,
        histories: Iterable[Sequence[int]],
        *,
        validate: Callable[["SASRec"], float] | None = None,
        loss: str = "softmax",
        num_epochs: int = 40,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        lr_scheduler_type: str = "constant_with_warmup",
        warmup_steps: int = 100,
        weight_average_decay: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> "SASRec":
        """Trains on every position of every history: all targets of a user in one pass.

        Args:
            histories (iterable of lists of `int`): item indices in time order, e.g. `dataset["train"]["history"]`; a
                history longer than `max_length + 1` is cut into windows, so that no target is lost.
            validate (`Callable[[SASRec], float]`, *optional*): called after every epoch; the weights of the epoch with
                the highest value are kept. It must not read the test split. If None, the last epoch is kept.
            loss (`str`, defaults to `"softmax"`): `"softmax"`, cross-entropy over all items; or `"bce"`, the paper's
                binary cross-entropy with one negative per position (here uniform over all items but the target).
            num_epochs, batch_size (windows), learning_rate, weight_decay, lr_scheduler_type, warmup_steps: see
                `TrainingArguments`.
            weight_average_decay (`float`, *optional*): decay per step of an exponential moving average of the weights, at
                most (1 + t) / (10 + t) in step t; what is validated and kept is then the average. None: the weights.
            seed (`int`, defaults to 0): of the order of the users, the dropout and the negatives.
        """
        if loss not in ("softmax", "bce"):
            raise ValueError(f'loss must be "softmax" or "bce", got {loss!r}.')
        windows = [
            {"input_ids": window[:-1], "labels": window[1:]}
            for history in histories
            for end in range(len(history), 1, -self.max_length)
            if len(window := history[max(0, end - self.max_length - 1) : end]) > 1
        ]
        if not windows:
            raise ValueError("fit needs at least one history with two items or more.")
        self.training_log = []
        callback = _KeepBestEpoch(self, validate, weight_average_decay)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=num_epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                lr_scheduler_type=lr_scheduler_type,
                warmup_steps=warmup_steps,
                adam_beta2=0.98,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                logging_strategy="no",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                report_to="none",
                disable_tqdm=not progress,
                seed=seed,
            )
            trainer = Trainer(
                self.model,
                arguments,
                train_dataset=windows,
                data_collator=_pad_right,
                compute_loss_func=self._softmax_loss if loss == "softmax" else self._bce_loss,
                callbacks=[callback],
            )
            trainer.remove_callback(PrinterCallback)  # it prints; what it says is in `training_log`
            trainer.train()
        callback.restore()
        return self

    @torch.no_grad()
    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k best of all items for each row of `examples["history"]`, `(B, k)`; ties and -1: see `rank_items`."""
        histories = examples["history"]
        recent = [history[-self.max_length :] for history in histories]
        empty = [row for row, items in enumerate(recent) if not items]
        if empty:
            raise ValueError(
                f"SASRec needs at least one item in every history; rows {empty[:10]} of the batch have none. "
                "Leave cold users out when splitting (min_history=1)."
            )
        lengths = torch.tensor([len(items) for items in recent])
        last = torch.empty(len(recent), self.model.config.n_embd, device=self.model.device)  # (B, D)
        for rows in lengths.argsort().split(64):  # similar lengths together: little padding
            input_ids = _pad_right([{"input_ids": recent[row]} for row in rows.tolist()])["input_ids"]
            hidden = self.model(input_ids.to(last.device)).last_hidden_state
            last[rows] = hidden[torch.arange(len(rows)), lengths[rows] - 1]
        last, items = self._score_vectors(last)
        scores = last @ items.T  # (B, N)
        return rank_items(scores, k, exclude=histories if exclude_seen else None, generator=generator)

    def _score_vectors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` (M, D) and item vectors (N, D), such that their dot products are the scores."""
        items, temperature = self.model.wte.weight, self.model.config.score_temperature
        if temperature is None:
            return hidden, items
        return normalize(hidden, dim=-1) / temperature, normalize(items, dim=-1)

    def _softmax_loss(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
        position = labels != -100
        hidden, items = self._score_vectors(outputs.last_hidden_state[position])
        return FullSoftmaxLoss.apply(hidden, items, labels[position]) / num_items_in_batch

    def _bce_loss(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
        position = labels != -100
        hidden, items = self._score_vectors(outputs.last_hidden_state[position])
        positive = labels[position]
        negative = (positive + torch.randint_like(positive, 1, self.num_items)) % self.num_items
        logits = (hidden * items[torch.stack([positive, negative])]).sum(-1)  # (2, M)
        truth = torch.zeros_like(logits)
        truth[0] = 1.0
        return binary_cross_entropy_with_logits(logits, truth, reduction="sum") / num_items_in_batch


class _KeepBestEpoch(TrainerCallback):
    """Calls `validate` after every epoch and remembers the weights (or their average) of the best one, in memory."""

    def __init__(self, sasrec: SASRec, validate: Callable[[SASRec], float] | None, decay: float | None):
        self.sasrec, self.validate, self.decay = sasrec, validate, decay
        self.average: dict[str, torch.Tensor] | None = None
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.best_value = -float("inf")
        self.start = time.perf_counter()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.sasrec.model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if self.decay is None:
            return
        if self.average is None:
            self.average = self._weights()
        keep = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, value in self.sasrec.model.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def on_epoch_end(self, args, state, control, **kwargs):
        record = {"epoch": round(state.epoch), "seconds": time.perf_counter() - self.start}
        if self.validate is not None:
            raw = self._weights()
            if self.average is not None:
                self.sasrec.model.load_state_dict(self.average)
            self.sasrec.model.eval()
            record["validation"] = self.validate(self.sasrec)
            if record["validation"] > self.best_value:
                self.best_value, self.best_weights = record["validation"], self._weights()
            self.sasrec.model.train()
            self.sasrec.model.load_state_dict(raw)
        self.sasrec.training_log.append(record)
        logger.info(f"SASRec: {record}")

    def restore(self) -> None:
        weights = self.best_weights if self.validate is not None else self.average
        if weights is not None:
            self.sasrec.model.load_state_dict(weights)
        self.sasrec.model.eval()


def _pad_right(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads to the longest of the batch. No mask: a causal model's real positions never see what is on their right."""
    padded = {}
    for name, value in (("input_ids", 0), ("labels", -100)):
        if name in features[0]:
            rows = [torch.tensor(feature[name]) for feature in features]
            padded[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return padded
