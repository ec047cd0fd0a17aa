"""Supervised training of a OneRec model: TRL's `SFTTrainer` over collated histories, with the model's own loss (L_NTP,
L_Gen).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from .given import complete
from .next_item import NOT_READ, NextItemArguments, NextItemTrainer, refuse_unread

_TEXT_OF_SFT = (
    "chat_template_path dataset_text_field dataset_kwargs eos_token shuffle_dataset packing packing_strategy "
    "eval_packing completion_only_loss assistant_only_loss"
).split()
SFT_NOT_READ = (
    NOT_READ | {"loss_type": NOT_READ["label_smoothing_factor"]} | dict.fromkeys(_TEXT_OF_SFT, NOT_READ["max_length"])
)


@dataclass
class OneRecSFTConfig(NextItemArguments, SFTConfig):
    r"""
    TRL's `SFTConfig` with the defaults that training from collated histories needs. Fields that describe text, such as
    `packing` or `max_length`, are refused: nothing would read them.

    Args:
        remove_unused_columns: Off: the collator reads the columns of the split itself.
        label_names: `target_ids`, so that evaluation has a loss.
        train_sampling_strategy: Batches of users with histories of similar length, which the column `length` says;
            random order where there is none. A step of all processes is sorted together.
            The order of an epoch is a function of the seed: a run that resumes inside it goes on with the same
            batches.
        hub_strategy: `"end"`: one commit of the finished model; the checkpoints before it would be no complete
            repositories.
        restore_callback_states_from_checkpoint: On: a resumed run goes on with the patience that
            `EarlyStoppingCallback` had left.
        metric_for_best_model: Model choice on validation; any key that `generation_metrics` returns, or `"loss"`.
        learning_rate, gradient_checkpointing, bf16: 5e-5, off and off, as in transformers.
        weight_average_decay: Keeps an exponential moving average of the trained weights (Polyak averaging), with this
            decay per step; in step t it is at most (1 + t) / (10 + t). Evaluation, checkpoints and the final model
            then hold the average; training goes on with the raw weights, which lie beside the checkpoint. With a
            constant learning rate it stands for a decaying one, and every checkpoint is a finished model. None: no
            average. For data-parallel training.
    """

    dataset_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"skip_prepare_dataset": True})

    def __post_init__(self):
        refuse_unread(self, SFT_NOT_READ)
        super().__post_init__()


class OneRecSFTTrainer(NextItemTrainer, SFTTrainer):
    r"""
    TRL's `SFTTrainer`. Its loss is the model's own, a mean over the targets of the whole step; its `evaluate` also
    generates; it balances the experts of a mixture.

    Args:
        model: A OneRec model, a PEFT model around one, or the folder or repository of either.
        args ([`OneRecSFTConfig`], *optional*): Or any `TrainingArguments`, of which the fields that were set count.
            Left out, the defaults, and `output_dir` is the model's name and `-SFT`.
        data_collator (`Callable`, *optional*): Batches from rows, see `onerec_hf.data`. By default the one that lies
            beside the model, or, of a model without features, one of its catalogue; it is saved with the model.
        train_dataset, eval_dataset: Sets of `datasets`; of the evaluation several in a `dict`.
        processing_class (*optional*): The tokenizer that checkpoints get; by default one of the model's codebook
            sizes.
        generation_metrics (`Callable[[PreTrainedModel], dict[str, float]]`, *optional*): Called at every evaluation
            with the unwrapped model; its numbers are logged as `eval_<name>` and can choose the best checkpoint. Under
            several processes each one computes them on all rows it is given.
        callbacks, optimizers, peft_config, ...: As TRL's.
    """

    args: OneRecSFTConfig
    _tag_names = ["onerec", "sft"]
    _card_method = "Supervised: the negative log-probability of the codes of each target, with TRL's `SFTTrainer`."

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs,
    ):
        if kwargs.get("formatting_func") is not None or kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "formatting_func and compute_loss_func would do nothing: rows are no text, and the loss is the "
                "model's own. Leave them out; override `compute_loss` for another loss."
            )
        model, args, data_collator, processing_class = complete(
            OneRecSFTConfig,
            "SFT",
            model,
            args,
            data_collator,
            processing_class,
            kwargs.pop("quantization_config", None),
        )
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )


__all__ = ["OneRecSFTConfig", "OneRecSFTTrainer"]
