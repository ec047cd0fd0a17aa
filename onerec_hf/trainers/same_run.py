"""Whether a run that is resumed is the run that was stopped: its model, its optimizer, and the arguments that change
its course.
"""

import json
from dataclasses import fields
from enum import Enum
from typing import Any

from transformers import PreTrainedConfig, Trainer

# in the checkpoint's optimizer, and taken from there whatever the new run says
_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
# names of one optimizer with one state; which of them is the default depends on the version of torch
_ADAMW = {"adamw_torch", "adamw_torch_fused"}
# fields of a model's config that only say how it is trained, besides those that end in "dropout"
_KNOBS = (
    "router_bias_update_rate loss_reduction item_loss_weight fused_weight target_weights initializer_range "
    "reward_weights"
).split()
# how long a run goes on, and what it writes, evaluates and runs on: none changes what the next step does
_NEUTRAL = (
    "max_steps num_train_epochs output_dir resume_from_checkpoint local_rank use_cpu debug load_best_model_at_end "
    "metric_for_best_model greater_is_better prediction_loss_only ignore_data_skip skip_memory_metrics "
    "remove_unused_columns label_names run_name project batch_eval_metrics num_completions_to_print "
    "enable_jit_checkpoint trust_remote_code"
).split()
_NEUTRAL_STARTS = tuple(
    (
        "logging_ log_ eval_ per_device_eval save_ hub_ push_ report_ trackio_ dataloader_num dataloader_p "
        "dataloader_m ddp_ fsdp deepspeed torch_compile disable_tqdm do_ include_ vllm_ restore_ torch_empty "
        "dataset_num_proc"
    ).split()
)


def run_settings(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """
    What a checkpoint says of its run, as JSON.

    Args:
        trainer (`Trainer`): Before its first step: a training changes some of its arguments.

    Returns:
        `model`: the fields of the model's own config, and its adapter; `optimizer`: the arguments that the saved
        optimizer holds; `course`: the other arguments that change what a step does, the collator's, and the fields of
        the config that only say how the model is trained, such as its dropout.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapter = next(iter(model.peft_config.values())) if hasattr(model, "peft_config") else None
    config = (model if adapter is None else model.get_base_model()).config
    of_all = {entry.name for entry in fields(PreTrainedConfig)} | {"catalogue_fingerprint", "use_cache"}
    own = {entry.name: vars(config).get(entry.name) for entry in fields(config) if entry.name not in of_all}
    shape = None if adapter is None else {name: vars(adapter).get(name) for name in ("r", "lora_alpha", "use_dora")}
    given = {entry.name: vars(trainer.args).get(entry.name) for entry in fields(trainer.args)}
    course = {
        name: value
        for name, value in given.items()
        if name not in (*_OPTIMIZER, *_NEUTRAL) and not name.startswith(_NEUTRAL_STARTS)
    }
    collator = vars(trainer).get("collator") or trainer.data_collator
    course |= {name: value for name, value in getattr(collator, "settings", {}).items() if name not in course}
    knobs = {name: own.pop(name) for name in list(own) if name in _KNOBS or name.endswith("dropout")}
    course |= {name: value for name, value in knobs.items() if name not in course}
    optimizer = {name: given[name] for name in _OPTIMIZER}
    return {"model": _json(own | {"adapter": shape}), "optimizer": _json(optimizer), "course": _json(course)}


def differences(written: dict[str, Any], now: dict[str, Any]) -> str:
    """What two runs have under one name and not alike, in words; empty where there is nothing."""
    names = [name for name in now if name in written and written[name] != now[name]]
    return "; ".join(f"{name} {written[name]!r} there, {now[name]!r} here" for name in names)


def same_optimizer(written: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two runs have another `optim`, and both names stand for one optimizer with one state."""
    names = {written.get("optim"), now["optim"]}
    return len(names) == 2 and names <= _ADAMW


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file, without what no file can hold."""
    found = {}
    for name, value in values.items():
        try:
            found[name] = json.loads(json.dumps(value.value if isinstance(value, Enum) else value))
        except TypeError:
            continue
    return found


__all__ = ["differences", "run_settings", "same_optimizer"]
