"""The two steps of a search as graphs: the context is encoded once per user, then one token per beam is decoded."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..models.modeling_attention import ContextKV

OUTPUTS = {"encode": ("keys", "values", "mask"), "decode": ("logits", "next_keys", "next_values")}
_LARGE = 10**9  # bytes of weights beyond which an ONNX file keeps them in a file of their own; 2 GB is its limit


class EncodeStep(nn.Module):
    """
    Inputs of `model.encode_context`, by their names -> `keys` and `values` (S, B, H, C, head_dim) of S key/value sets,
    `mask` (B, C), where C context positions begin with the static slot.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.context_processor = model.model.context_processor

    def forward(
        self,
        context_ids: Tensor,
        context_mask: Tensor,
        context_features: Tensor | None = None,
        user_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = self.context_processor(context_ids, context_mask, context_features, user_features)
        return torch.stack(found.key_states), torch.stack(found.value_states), found.mask


class _Past:
    """A cache that begins with given keys and values, as the decoder asks for one."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = list(keys.unbind(0)), list(values.unbind(0))

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer] = torch.cat([self.keys[layer], keys], dim=2)
        self.values[layer] = torch.cat([self.values[layer], values], dim=2)
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *args: Any) -> int:
        return self.keys[0].shape[2]


class DecodeStep(nn.Module):
    """
    One more token of each beam: `tokens` (B, K), `keys`, `values`, `mask` of the encode step, and `past_keys`,
    `past_values` (layers, B, K, H, P, head_dim) of the P tokens before -> `logits` (B, K, vocabulary) of the next
    token, `next_keys` and `next_values` with P + 1 tokens.
    """

    def __init__(self, model: Any):
        super().__init__()
        # without the weights that encode the context; a search turns no query, so it needs no rotary positions
        self.model, self.lm_head = copy.copy(model.model), model.lm_head
        self.model._modules = dict(model.model._modules)
        self.model.context_processor = nn.Module()
        self.model.context_processor.rotary = None

    def forward(
        self, tokens: Tensor, keys: Tensor, values: Tensor, mask: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        length = past_keys.shape[4]
        past = _Past(past_keys.flatten(1, 2), past_values.flatten(1, 2))
        hidden = self.model(
            tokens.flatten().unsqueeze(1),
            attention_mask=torch.ones(1, 1, 1, length + 1, dtype=torch.bool),
            position_ids=torch.full((1, 1), length),
            past_key_values=past,
            context_kv=ContextKV(key_states=keys.unbind(0), value_states=values.unbind(0), mask=mask),
            use_cache=True,
        ).last_hidden_state
        logits = self.lm_head(hidden[:, -1]).unflatten(0, tokens.shape)
        after = (torch.stack(states).unflatten(1, tokens.shape) for states in (past.keys, past.values))
        return (logits, *after)


@torch.no_grad()
def export_steps(
    model: Any, context: Mapping[str, Tensor], folder: str | os.PathLike, onnx: bool = True
) -> dict[str, ExportedProgram]:
    """
    Writes `encode.pt2` and `decode.pt2`, and `encode.onnx` and `decode.onnx`, for any number of users, items of a
    history and beams. (The history of OneRecV1 has the length of its pathways. `decode.pt2` takes two beams or more.)

    Args:
        model: A OneRec model in evaluation mode, float32, on the CPU.
        context: Inputs of `model.encode_context`, of two users or more and with two items or more each.
        onnx: Whether the ONNX files are written, too.

    Returns:
        The two programs by name.

    Raises:
        ValueError: For a model in training mode, on another device, or of another type.
    """
    kinds = {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
    if model.training or kinds != {(torch.float32, "cpu")}:
        raise ValueError(
            f"the model is {'in training mode' if model.training else sorted(map(str, kinds))}: an export is of "
            "float32 on the CPU, so call `model.eval().float().cpu()` before."
        )
    experts = model.config._experts_implementation
    if model.config.has_experts:
        model.set_experts_implementation("eager")  # the plain loop: grouped products are no operators of ONNX
    try:
        programs = {"encode": _encode(model, context), "decode": _decode(model, context)}
    finally:
        if model.config.has_experts:
            model.set_experts_implementation(experts)
    for name, program in programs.items():
        for node in program.graph.nodes:  # paths of this machine, which would be written into the files
            node.meta.pop("stack_trace", None)
        torch.export.save(program, Path(folder) / f"{name}.pt2")
        if onnx:
            _write_onnx(program, Path(folder) / f"{name}.onnx", OUTPUTS[name])
    return programs


def _encode(model: Any, context: Mapping[str, Tensor]) -> ExportedProgram:
    users = Dim("users")
    items = Dim.STATIC if model.config.model_type == "onerec_v1" else Dim("items")
    shapes = {name: {0: users} if name == "user_features" else {0: users, 1: items} for name in context}
    return torch.export.export(EncodeStep(model).eval(), (), dict(context), dynamic_shapes=shapes, strict=False)


def _decode(model: Any, context: Mapping[str, Tensor]) -> ExportedProgram:
    config = model.config
    encoded = model.encode_context(**context)
    batch = len(encoded.mask)
    past = torch.zeros(
        config.num_hidden_layers, batch, 3, config.num_key_value_heads, 2, config.head_dim
    )  # of three beams and two tokens
    inputs = {
        "tokens": torch.full((batch, 3), config.bos_token_id),
        "keys": torch.stack(encoded.key_states),
        "values": torch.stack(encoded.value_states),
        "mask": encoded.mask,
        "past_keys": past,
        "past_values": past.clone(),
    }
    users, beams, length = Dim("users"), Dim("beams", min=2), Dim("past")
    slots = Dim.STATIC if config.model_type == "onerec_v1" else Dim("positions")
    states, before = {1: users, 3: slots}, {1: users, 2: beams, 4: length}
    shapes = {"tokens": {0: users, 1: beams}, "keys": states, "values": states, "mask": {0: users, 1: slots}}
    shapes |= {"past_keys": before, "past_values": before}
    return torch.export.export(DecodeStep(model).eval(), (), inputs, dynamic_shapes=shapes, strict=False)


def _write_onnx(program: ExportedProgram, path: Path, outputs: tuple[str, ...]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    # it warns, each time, of operators of torchvision that are not installed
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.onnx.export(program, (), path, dynamo=True, output_names=outputs, external_data=size > _LARGE, verbose=False)


__all__ = ["DecodeStep", "EncodeStep", "export_steps"]
