"""How models are split over processes.

Tensor- and expert-parallel plans say which weights `from_pretrained(distributed_config=...)` of transformers splits,
and how. Names are those of the base models; a rule for a block that a model does not have (experts in a dense one)
changes nothing. There is no rule for `lm_head`, which is read in slices of a level, and none for OneRec-V2's context,
whose keys all blocks share whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def _attention(attention: str) -> dict[str, str]:
    return {f"{attention}.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}


def _mlp(mlp: str) -> dict[str, str]:
    """A dense feed-forward, or a mixture of experts with its shared ones."""
    rules = {f"{mlp}.experts.gate_up_proj": "packed_colwise", f"{mlp}.experts.down_proj": "rowwise"}
    rules[f"{mlp}.experts"] = "moe_tp_experts"
    for dense in (mlp, f"{mlp}.shared_experts"):
        rules |= {f"{dense}.gate_proj": "colwise", f"{dense}.up_proj": "colwise", f"{dense}.down_proj": "rowwise"}
    return rules


def _experts(experts: str) -> dict[str, str]:
    """Whole experts per process."""
    weights = {f"{experts}.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
    return weights | {experts: "ep_dispatch_experts"}


DECODER_TP_PLAN = _attention("decoder.layers.*.self_attn") | _mlp("decoder.layers.*.mlp")
DECODER_EP_PLAN = _experts("decoder.layers.*.mlp.experts")
# of the systems whose blocks have context keys of their own: the heads of the attention to the context are split too
ENCODER_TP_PLAN = {
    **_attention("context_processor.layers.*.self_attn"),
    **_mlp("context_processor.layers.*.mlp"),
    "context_processor.key_values.*.k_proj": "colwise",
    "context_processor.key_values.*.v_proj": "colwise",
    "decoder.layers.*.cross_attn.q_proj": "colwise",
    "decoder.layers.*.cross_attn.o_proj": "rowwise",
}
ENCODER_EP_PLAN = _experts("context_processor.layers.*.mlp.experts")


@contextmanager
def unsharded_class(model: nn.Module) -> Iterator[None]:
    """
    Inside, a model that FSDP2 has sharded is of its own class again.

    `fully_shard` gives it a child class in a private module of torch, which `save_pretrained` would name, and copy, as
    its code.
    """
    sharded = type(model)
    model.__class__ = next(base for base in sharded.__mro__ if not base.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = sharded


__all__ = ["DECODER_EP_PLAN", "DECODER_TP_PLAN", "ENCODER_EP_PLAN", "ENCODER_TP_PLAN", "unsharded_class"]
