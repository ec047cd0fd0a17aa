"""What the models ask of their inputs, said before anything is computed.

Shapes are compared everywhere, values on a CPU alone: on a GPU every comparison would wait for the device, where the
embedding kernels stop at a value outside their table anyhow, and a compiled graph cannot read values. Legend: B users,
T context items, L levels.
"""

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_onerec import NUM_SPECIAL_TOKENS

# what `Trainer`, TRL and `generate` hand to every model's `forward`, and what is read outside of it
_KNOWN_TO_TRANSFORMERS = {"num_items_in_batch", "cache_position", "return_dict"}
_RECORDED = {"output_hidden_states", "output_attentions", "output_router_logits"}


def readable(values: Tensor) -> bool:
    """Whether `values` can be looked at without waiting for a device, and not while a graph is made."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and values.numel() > 0


def check_range(name: str, values: Tensor, size: int, hint: str) -> None:
    """Raises `ValueError` where `values` on a CPU lie outside 0 to `size - 1`."""
    if readable(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
        low, high = int(values.min()), int(values.max())
        raise ValueError(f"{name} holds values from {low} to {high}: allowed are 0 to {size - 1}. {hint}")


def check_codes(
    config: Any, name: str, token_ids: Tensor, others: Collection[int], real: Tensor | None = None
) -> None:
    """
    Raises `ValueError` where `token_ids` (..., L) on a CPU hold a token that is no code of its level and not one of
    `others`.

    `real` (...), a bool mask, says which items are looked at; default all.
    """
    if not readable(token_ids):
        return
    low = torch.tensor(config.level_offsets)
    high = low + torch.tensor(config.codebook_sizes)
    wrong = (token_ids < low) | (token_ids >= high)
    for other in others:
        wrong &= token_ids != other
    if real is not None:
        wrong &= real.unsqueeze(-1)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        level = place[-1]
        raise ValueError(
            f"{name} holds {int(token_ids[place])} at place {list(place)}: level {level + 1} has the tokens "
            f"{int(low[level])} to {int(high[level]) - 1}. A token is the code plus "
            f"config.level_offsets={config.level_offsets}, as `tokenizer.encode_items` gives it. Add the offsets if "
            "these are plain codes; otherwise the semantic IDs come from another tokenizer."
        )


def checked_context(config: Any, context_ids: Tensor | None, context_mask: Tensor | None) -> Tensor:
    """`context_mask` (B, T), without one whatever is no padding; an error where an input is missing or does not fit
    the model.
    """
    if context_ids is None:
        raise ValueError("context_ids is missing: give the histories as token ids of shape (batch, items, levels).")
    if context_ids.dim() != 3 or context_ids.shape[2] != config.num_levels:
        raise ValueError(
            f"context_ids has shape {tuple(context_ids.shape)}: expected (batch, items, {config.num_levels}), one "
            "token per level of each item."
        )
    if context_ids.shape[0] == 0:
        raise ValueError(
            f"context_ids has shape {tuple(context_ids.shape)}: the batch is empty. Give at least one user."
        )
    if context_mask is None:
        mask = (context_ids != config.pad_token_id).any(-1)
    elif context_mask.shape != context_ids.shape[:2]:
        raise ValueError(
            f"context_mask has shape {tuple(context_mask.shape)}: expected {tuple(context_ids.shape[:2])}, one row "
            "per user and one column per item of context_ids, True for real items."
        )
    else:
        mask = context_mask.bool()
    check_range("context_ids", context_ids, config.vocab_size, "Padding is 0.")
    check_codes(config, "context_ids", context_ids, range(NUM_SPECIAL_TOKENS), mask)
    return mask


def check_kwargs(owner: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises where a keyword argument of `owner.forward` would change nothing: nothing is ignored in silence."""
    config = owner.config
    if given := sorted({"target_positions", "causal_targets"} & set(kwargs)):
        raise ValueError(
            f"{given[0]}: the encoder of {type(owner).__name__} mixes the items of a context, so every target "
            "sees all of them. Give one row per target, with the items before it as context."
        )
    if unknown := sorted(set(kwargs) - _KNOWN_TO_TRANSFORMERS - _RECORDED):
        raise TypeError(
            f"{type(owner).__name__}.forward does not know {unknown}, and would ignore it. Leave it out; the "
            "arguments are listed in the docstring of `forward`."
        )
    if kwargs.get("output_router_logits") and not config.has_experts:
        raise ValueError(
            "output_router_logits=True, but no block of this model is a mixture of experts "
            f"(num_experts={config.num_experts}). Leave it out."
        )
    if kwargs.get("output_attentions") and config._attn_implementation != "eager":
        raise ValueError(
            f"output_attentions=True, but attn_implementation={config._attn_implementation!r} gives no attention "
            "weights. Call `model.set_attn_implementation('eager')` first."
        )


def given_or_encoded(model: Any, context_kv: Any, *context: Tensor | None) -> Any:
    """The context's keys and values: as given, or encoded from what `model.encode_context` takes; never both."""
    if context_kv is None:
        return model.encode_context(*context)
    names = ("context_ids", "context_mask", "context_features", "user_features")
    if both := [name for name, value in zip(names, context) if value is not None]:
        raise ValueError(
            f"context_kv together with {both}: the encoded context takes their place. Give one of the two."
        )
    return context_kv


def check_targets(config: Any, target_ids: Tensor, target_positions: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raises `ValueError` on a `target_ids` of another shape, or beside one of `others` that is not None."""
    if given := [name for name, value in others.items() if value is not None]:
        hint = " The mask of the history is context_mask." if "attention_mask" in given else ""
        raise ValueError(
            f"target_ids stands for input_ids and labels together, and has no place for {given}: give one or the "
            f"other.{hint}"
        )
    shape = tuple(target_ids.shape)
    if len(shape) != 3 or shape[2] != config.num_levels or 0 in shape:
        raise ValueError(
            f"target_ids has shape {shape}: expected (batch, targets, {config.num_levels}), with at least one target."
        )
    if target_positions is not None and target_positions.shape != shape[:2]:
        raise ValueError(
            f"target_positions has shape {tuple(target_positions.shape)}: expected {shape[:2]}, one number per target."
        )
    check_codes(config, "target_ids", target_ids, (config.pad_token_id,))


def asked(causal_targets: bool | Tensor | None) -> bool:
    """Whether `causal_targets` says yes; a tensor does, and a batch that holds both kinds of rows cannot be."""
    if not isinstance(causal_targets, Tensor):
        return bool(causal_targets)
    if readable(causal_targets) and not bool(causal_targets.all()):
        raise ValueError(
            f"causal_targets={causal_targets.tolist()[:8]}: the rows of a batch are all of one kind. Leave it out "
            "where target_positions say what each target sees."
        )
    return True


def check_causal(mask: Tensor, rows: int, target_positions: Tensor | None) -> None:
    """Raises `ValueError` where rows or a context `mask` (B, 1 + T) are not made for `causal_targets`."""
    batch, positions = mask.shape
    if rows != batch * positions:
        raise ValueError(
            f"causal_targets=True with {rows} rows for {batch} histories of {positions - 1} items: row i of a user "
            f"sees the first i items, so there are {positions} rows for each, the first of which sees none."
        )
    if readable(mask) and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "causal_targets=True with a context_mask that has padding in front of an item: pad histories on the "
            "right, or say with target_positions alone how many items each target sees."
        )
    if target_positions is not None and readable(target_positions):
        given = target_positions.reshape(batch, -1)
        if given.shape[1] != positions or bool(((given != torch.arange(positions)) & (given != 0)).any()):
            raise ValueError(
                f"target_positions beside causal_targets=True: target i sees i items, or 0 where it is padding; "
                f"given are {given[0].tolist()[:8]}. Leave one of the two out."
            )


def check_attention_mask(attention_mask: Tensor | None, rows: Tensor | None) -> None:
    """Raises `ValueError` on a mask of two dimensions that is not one of `rows` (R, C, ...), before which no cache
    stands.
    """
    if attention_mask is None or rows is None or attention_mask.dim() != 2:
        return
    if attention_mask.shape != rows.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the rows {tuple(rows.shape[:2])}: it belongs to "
            "input_ids. The mask of the history is context_mask: `model(context_ids=..., context_mask=..., "
            "input_ids=...)`."
        )


def checked_labels(labels: Tensor | None, shift_labels: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """`labels` (R, C), made of `shift_labels` where these are given; `rows` (R, C, ...) is read, without the last code
    at will.
    """
    if labels is not None and shift_labels is not None:
        raise ValueError("labels and shift_labels are given: give one, shift_labels are labels one place earlier.")
    if shift_labels is not None:
        labels = F.pad(shift_labels[:, :-1], (1, 0), value=-100)  # nothing stands in front of the first token
    if labels is None or rows is None:
        return labels
    if (
        len(labels) != len(rows) or not 0 <= labels.shape[1] - rows.shape[1] <= 1
    ):  # nothing is read behind the last code
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, the rows {tuple(rows.shape[:2])}: give one label per token."
        )
    return labels


def widths_of(num_beams: int | Sequence[int], num_levels: int) -> list[int]:
    """The width of every level, from one for all or one for each; `ValueError` where it is neither."""
    widths: list[Any] = [num_beams] * num_levels if isinstance(num_beams, Integral) else list(cast(Any, num_beams))
    if len(widths) != num_levels or not all(isinstance(width, Integral) and int(width) >= 1 for width in widths):
        raise ValueError(
            f"num_beams (or samples)={num_beams}: a number of at least 1, or a list of {num_levels} of them, one for "
            "each level."
        )
    return [int(width) for width in widths]


def at_least(num_beams: int | Sequence[int], k: int) -> int | list[int]:
    """`num_beams`, wide enough in the end for `k` results."""
    if isinstance(num_beams, Integral):
        return max(int(k), int(num_beams))
    *early, last = cast(Sequence[int], num_beams)
    return [*early, max(k, last)]


def check_rows_allowed(allowed_items: Any, batch: int, num_nodes: list[int]) -> None:
    """Raises `ValueError` where `allowed_items`, as `catalogue.node_masks` makes it, is not of `batch` requests (or of
    one for all).
    """
    masks = isinstance(allowed_items, (list, tuple)) and all(isinstance(mask, Tensor) for mask in allowed_items)
    if not masks or [mask.shape[-1] for mask in allowed_items] != num_nodes:
        raise ValueError(
            f"allowed_items is a {type(allowed_items).__name__}: expected a bool tensor (batch, items), or what "
            "`catalogue.node_masks` of the same catalogue made of one."
        )
    if allowed_items[0].shape[0] not in (1, batch):
        raise ValueError(
            f"allowed_items has {allowed_items[0].shape[0]} rows for {batch} users: give one row per user, or one row "
            "for all."
        )


def check_finite(scores: Tensor, what: str) -> None:
    """Raises `ValueError` where `scores` hold NaN; reads the device once. `-inf` is that of a dead beam."""
    if scores.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read while a graph is recorded
    if scores.device.type != "meta" and bool(scores.isnan().any()):
        raise ValueError(
            f"{what}: scores are NaN, so no item can be ranked: the weights or the inputs are not finite (NaN or "
            "inf). The parameters: `[n for n, p in model.named_parameters() if not p.isfinite().all()]`. Load an "
            "earlier checkpoint, or use bfloat16 or float32 where float16 overflows."
        )


def check_generate(
    config: Any, inputs: Tensor | None, settings: Any, model_kwargs: Mapping[str, Any], num_session_items: int
) -> int:
    """B, the number of users of a search; raises `ValueError` on numbers and shapes that no search gives a meaning."""
    numbers = {"num_session_items": num_session_items}
    if settings is not None:
        numbers |= {"num_beams": settings.num_beams, "num_return_sequences": settings.num_return_sequences}
    if wrong := {name: number for name, number in numbers.items() if number is not None and number < 1}:
        raise ValueError(f"the search got {wrong}: each must be at least 1.")
    if config.session_wise and num_session_items > config.num_session_items:
        raise ValueError(
            f"num_session_items={num_session_items}: the model has positions for sessions of "
            f"num_session_items={config.num_session_items} items at most."
        )
    context_kv, context_ids = model_kwargs.get("context_kv"), model_kwargs.get("context_ids")
    if (context_kv is None) == (context_ids is None):
        raise ValueError(
            "context_ids is missing: give the histories as token ids of shape (batch, items, levels), or context_kv, "
            "which is the context encoded before; and not both."
        )
    batch = len(context_ids if context_kv is None else context_kv.mask)
    if inputs is not None and (inputs.dim() != 2 or len(inputs) != batch):
        raise ValueError(f"input_ids has shape {tuple(inputs.shape)}: expected one row for each of {batch} users.")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and tuple(mask.shape) != (batch, 1 if inputs is None else inputs.shape[1]):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: it belongs to input_ids, BOS alone. The mask of the "
            "history is context_mask."
        )
    return batch


__all__ = [
    "check_attention_mask",
    "check_codes",
    "check_finite",
    "check_kwargs",
    "check_range",
    "check_rows_allowed",
    "check_targets",
    "checked_context",
    "checked_labels",
]
