"""What a trainer fills in where its caller gave nothing, as TRL's do: arguments, the model behind a folder, tokenizer,
collator.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils.hub import cached_file

from ..collators.loading import collator_of
from ..models import SemanticIdTokenizer


def complete(
    kind: type,
    method: str,
    model: Any,
    args: TrainingArguments | None,
    data_collator: Callable | None,
    processing_class: Any = None,
    quantization_config: Any = None,
) -> tuple[Any, Any, Callable, Any]:
    """
    Model, arguments, collator and tokenizer of a trainer: those that are given, and the rest made of them.

    Args:
        kind: Class of the arguments.
        method: End of `output_dir` where no arguments are given, as `"SFT"`.
        model: A OneRec model, a PEFT model around one, or the folder or repository of a model or of an adapter.

    Raises:
        TypeError: A model that is no OneRec model, arguments that are none.
        ValueError: A tokenizer of other codebook sizes; no collator where one cannot be made (see [`collator_of`]).
    """
    model = str(model) if isinstance(model, os.PathLike) else model
    settings = complete_arguments(kind, method, model, args)
    repo, revision = model if isinstance(model, str) else None, None
    if repo is not None:
        model = load_model(repo, settings, quantization_config)
        revision = (settings.model_init_kwargs or {}).get("revision")
    policy = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not hasattr(policy, "loss_items"):
        raise TypeError(
            f"model is a {type(policy).__name__}: a OneRec model is needed (OneRecForCausalLM, OneRecV1ForCausalLM, "
            "OneRecV2ForCausalLM), a PEFT model around one, or the folder or repository of one."
        )
    sizes = policy.config.codebook_sizes
    if processing_class is None:
        processing_class = SemanticIdTokenizer(codebook_sizes=sizes, catalogue=getattr(policy, "catalogue", None))
    if (own := getattr(processing_class, "codebook_sizes", sizes)) != sizes:
        raise ValueError(
            f"processing_class has codebook_sizes={own}, the model {sizes}: they come from different semantic IDs. "
            "Leave it out, or give the tokenizer that lies beside the model."
        )
    if data_collator is None:
        base, commit = policy.config._name_or_path, vars(policy.config).get("_commit_hash")  # of a repository
        repos = [name for name in dict.fromkeys((repo, base)) if name and (name == repo or _exists(name))]
        data_collator = _default_collator(policy, repos, revision or commit)
    return model, settings, data_collator, processing_class


def complete_arguments(kind: type, method: str, model: Any, args: TrainingArguments | None) -> Any:
    """`args` as a `kind`: of other `TrainingArguments` the fields that were set, of none the defaults of `kind`."""
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
        return kind(output_dir=f"{Path(name).name}-{method}")
    if isinstance(args, kind):
        return args
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: give a {kind.__name__}, TrainingArguments, or nothing.")
    default = type(args)(output_dir=args.output_dir)
    names = [entry.name for entry in dataclasses.fields(args) if entry.init]
    changed = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(default, name)}
    if unknown := sorted(set(changed) - {entry.name for entry in dataclasses.fields(kind)}):
        raise ValueError(f"args sets {unknown}, which {kind.__name__} does not have: leave them out.")
    return kind(**{"output_dir": args.output_dir} | changed)


def load_model(repo: str, args: Any, quantization_config: Any = None) -> Any:
    """The model of a folder or repository in float32, as TRL loads one; of an adapter, base and adapter, to be trained
    further.
    """
    settings = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    names = {name: settings[name] for name in ("revision", "token", "cache_dir") if name in settings}
    adapter = cached_file(repo, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **names)
    if adapter is not None:
        # not AutoPeftModel, which imports no modelling code of ours for an adapter without a task type
        adapter_config = PeftConfig.from_pretrained(repo, **names)
        base = settings | {"revision": adapter_config.revision}
        model = AutoModelForCausalLM.from_pretrained(adapter_config.base_model_name_or_path, **base)
        return PeftModel.from_pretrained(model, repo, is_trainable=True, **names)
    return AutoModelForCausalLM.from_pretrained(repo, **settings)


def _exists(name: str) -> bool:
    return os.path.isdir(name) or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def _default_collator(policy: Any, repos: list[str], revision: str | None) -> Callable:
    collator = collator_of(policy, *repos, revision=revision)
    if collator.user_feature_sizes:
        raise ValueError(
            f"data_collator is missing: the model reads the user features {sorted(collator.user_feature_sizes)}, and "
            "the users of a training set lie in no repository. Give a collator with `user_features` of the rows' "
            "users."
        )
    return collator


__all__ = ["complete", "complete_arguments", "load_model"]
