"""What a trainer does with its output folder: it checks that it can write there, writes the card, and pushes it in one
commit.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import CommitInfo
from transformers.utils import logging

from .._version import __version__
from ..collators import OneRecCollator
from ..evaluation import prediction_entropy
from ..hub import model_card, plot_prediction_entropy, plot_training_curve, push_to_hub, table_cell
from .resume import ResumableTrainer, StopAtNonFinite

logger = logging.get_logger(__name__)


class HubMixin(StopAtNonFinite, ResumableTrainer):
    """
    To be named before `Trainer` (or a trainer of TRL) among the bases. A trainer may set:

    `_card_method`: one sentence that says what it does. `_card_settings`: names of its arguments that the card tells.
    `_card_papers`: keys of `hub.cards.PAPERS` that it adds to the citations.
    """

    _card_method = ""
    _card_settings: tuple[str, ...] = ()
    _card_papers: tuple[str, ...] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        folder = self.args.output_dir
        if self.args.should_save and not os.access(
            folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids
        ):
            raise PermissionError(
                f"output_dir={folder!r} cannot be written: choose another folder, or `chmod u+w` this one. Nothing "
                "was trained."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As `Trainer._save`, and the collator: a checkpoint, too, can be served."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self._collator, OneRecCollator):
            self._collator.save_pretrained(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config") and not next(iter(model.peft_config.values())).base_model_name_or_path:
            logger.warning_once(
                "the adapter is saved, and its base lies nowhere, so nothing can load it: "
                "`trainer.model.merge_and_unload()` and `save_pretrained(folder)` keep the whole model; or save the "
                "base before training, and give its folder as `model`."
            )

    def create_model_card(  # type: ignore[override]  # in TRL's order
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        **card,
    ) -> None:
        """
        Writes `README.md`, `training_curve.png` and `prediction_entropy.png` into `args.output_dir`, from what the run
        knows.

        Args:
            model_name, dataset_name, tags, finetuned_from: As in transformers and TRL; all may be left out.
            card: Arguments of [`~hub.model_card`] that replace what is found here (`data`, `training`, `results`,
                `pictures`, ...).
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        title = model_name or (self.args.hub_model_id or folder.name).split("/")[-1]
        metrics = self._last_evaluation()
        arguments = {
            "title": title,
            "repo": self.args.hub_model_id or str(folder),
            "data": self._data_text(dataset_name or "The training log"),
            "training": self._training_text(),
            "results": {title: (metrics, None)} if metrics else None,
            "dataset_name": dataset_name or "validation split of the training log",
            "split": "validation",
            "pictures": self._draw(folder, model),
            "num_parameters": model.num_parameters() if hasattr(model, "num_parameters") else None,
            "base_model": finetuned_from or _base_model(model),
            "adapter": hasattr(model, "peft_config"),
            "tags": [tags] if isinstance(tags, str) else list(tags or []),
            "papers": self._card_papers,
        }
        model_card(model.config, **arguments | card).save(folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | None:
        """Model, tokenizer, catalogue, code and card in one commit ([`~hub.push_to_hub`]), always blocking; `card` as
        above.
        """
        self.save_model(_internal_call=True)  # every process takes part in it
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        return push_to_hub(
            self.args.output_dir,
            self.args.hub_model_id or Path(self.args.output_dir).name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision,
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
        )

    def _last_evaluation(self) -> dict[str, float]:
        """The latest validation metrics of generation, `recall@10` and the like."""
        for record in reversed(self.state.log_history):
            metrics = {name.removeprefix("eval_"): v for name, v in record.items() if "@" in name}
            if metrics:
                return metrics
        return {}

    def _data_text(self, dataset_name: str) -> str:
        parts = [
            f"{len(rows):,} {name} rows"
            for name, rows in (("training", self.train_dataset), ("validation", self.eval_dataset))
            if hasattr(rows, "__len__") and not isinstance(rows, dict)
        ]
        return f"{table_cell(dataset_name)}: " + (", ".join(parts) or "streamed") + "."

    def _training_text(self) -> str:
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        optimizer, schedule = (getattr(name, "value", name) for name in (args.optim, args.lr_scheduler_type))
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        facts: dict[str, Any] = {
            "steps": f"{self.state.global_step:,} ({self.state.epoch or 0:.3g} epochs)",
            "rows per step": batch,
            "optimizer": f"{optimizer}, betas {args.adam_beta1:g} / {args.adam_beta2:g}, "
            f"weight decay {args.weight_decay:g}",
            "learning rate": f"{args.learning_rate:g}, {schedule}",
            "precision, seed": f"{precision}, {args.seed}",
            "versions": f"onerec_hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        }
        facts |= {f"`{name}`": getattr(args, name) for name in self._card_settings}
        rows = "\n".join(f"| {name} | {table_cell(value)} |" for name, value in facts.items())
        return f"{self._card_method}\n\n| | |\n|---|---|\n{rows}".strip()

    def _draw(self, folder: Path, model) -> list[tuple[str, str]]:
        """Pictures of the run, and those that lie in the folder already: (file name, caption)."""
        if importlib.util.find_spec("matplotlib") is None:
            logger.warning_once(
                "the card gets no pictures: `pip install matplotlib`, then `trainer.create_model_card()`."
            )
            return []
        drawn = (
            not self.is_in_train
        )  # TRL writes a card beside every checkpoint; its pictures can wait for the last one
        if drawn and any({"loss", "eval_loss"} & record.keys() for record in self.state.log_history):
            plot_training_curve(self.state.log_history, folder / "training_curve.png")
        if drawn and (rows := self._entropy_rows()) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            entropies = prediction_entropy(model, self._collator(rows))
            plot_prediction_entropy(
                {"model": entropies}, model.config.codebook_sizes, folder / "prediction_entropy.png"
            )
        captions = {
            "training_curve.png": "Training curve",
            "codebook_usage.png": "Use of the codes",
            "prediction_entropy.png": "Entropy of the prediction, per level",
        }
        return [(name, caption) for name, caption in captions.items() if (folder / name).is_file()]

    def _entropy_rows(self, most: int = 256) -> list[dict]:
        """Validation rows that have targets, in the order of the split."""
        rows = self.eval_dataset
        if not isinstance(self._collator, OneRecCollator) or not isinstance(rows, datasets.Dataset):
            return []
        return [rows[i] for i in range(min(most, len(rows)))] if "targets" in rows.column_names else []

    @property
    def _collator(self):
        """Of the rows; IPA and GRPO wrap it and keep it as `collator`."""
        return getattr(self, "collator", self.data_collator)


def _base_model(model) -> str | None:
    """Repository of the model that was trained further, None where it came from this machine."""
    if hasattr(model, "peft_config"):
        name = next(iter(model.peft_config.values())).base_model_name_or_path
    else:
        name = model.config._name_or_path
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None


__all__ = ["HubMixin"]
