"""Configuration of OneRec-V2 (arXiv:2508.20900)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_onerec import SemanticIdConfig


@strict
class OneRecV2Config(SemanticIdConfig):
    r"""
    Configuration of [`OneRecV2ForCausalLM`], the lazy decoder-only model of OneRec-V2 (arXiv:2508.20900, section 2).

    The defaults are the 1B model of the paper's Table 5.

    Args:
        intermediate_size (`int`, *optional*): Width of the SwiGLU feed-forward. Not in the paper; `4 * hidden_size`
            fits its FLOPs at 0.5B exactly and is the default.
        num_context_layers (`int`, defaults to 1): L_kv, the number of distinct context key/value sets (section 2.2.1).
        context_key_value_split (`int`, defaults to 1): S_kv; 1 shares keys and values (v = k), 2 keeps separate
            values.
        context_position (`str`, defaults to `"rope"`): What orders the context; the paper does not say. `"rope"`:
            rotary positions in keys and queries, which need no mask. `"bias"`: a learned attention bias over the age
            of an item, which no fused kernel takes: slower, and memory grows with the square of the history.
            `"none"`: nothing. A config that gives `position_bias_buckets` alone is one of before this choice:
            `"bias"`, or `"none"` with 0.
        context_rope_theta (`float`, defaults to 10000.0): Base of the rotary angles.
        position_bias_buckets (`int`, *optional*, defaults to 32): Of `"bias"`: buckets of ages (1 = the most recent
            item).
        position_bias_max_distance (`int`, defaults to 128): Ages beyond it share the last bucket.
        first_dense_layers (`int`, defaults to 2): With experts, the first two blocks stay dense (section 2.2.2).
        num_shared_experts (`int`, defaults to 1): Beside the routed experts, where there are any (4B-A0.5B: 53 + 1,
            top-3).
        fixed_context_features (`list[str]`, *optional*): Those of `context_features` whose table is given and not
            trained, of the width that `feature_embed_dims` says: item vectors (text, co-occurrence), looked up by an
            item index, tell apart what the codes round off. Not in the papers, which use such vectors for the codes
            alone.
        context_dropout (`float`, *optional*): On context inputs, instead of `dropout`.
        item_head_dim (`int`, defaults to 0): Width of a second head, which scores every item by a dot product with
            the state of BOS, and whose loss is added; 0 for none. Not in the papers; see [`ItemHead`].
        item_head_size (`int`, defaults to 0): How many items it scores.
        item_loss_weight (`float`, defaults to 1.0): Of its loss, beside the loss over codes.
        kwargs: See [`SemanticIdConfig`].
    """

    model_type = "onerec_v2"

    hidden_size: int = 1792
    gated_mlp: bool = True
    num_hidden_layers: int = 18
    num_attention_heads: int = 14
    num_context_layers: int = 1
    context_key_value_split: int = 1
    context_embed_dim: int = 90
    context_position: Literal["rope", "bias", "none"] | None = None
    context_rope_theta: float | int = 10000.0
    position_bias_buckets: int | None = None
    position_bias_max_distance: int = 128
    num_experts_per_tok: int = 3
    num_shared_experts: int = 1
    first_dense_layers: int = 2
    loss_reduction: Literal["mean", "sum"] = "mean"
    fixed_context_features: list[str] | None = None
    context_dropout: float | int | None = None
    item_head_dim: int = 0
    item_head_size: int = 0
    item_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        self.fixed_context_features = list(self.fixed_context_features or [])
        self.context_dropout = self.dropout if self.context_dropout is None else self.context_dropout
        if self.context_position is None:
            old = self.position_bias_buckets
            self.context_position = "rope" if old is None else "bias" if old else "none"
        if self.context_position == "bias" and self.position_bias_buckets is None:
            self.position_bias_buckets = 32
        super().__post_init__(**kwargs)

    def validate_position(self) -> None:
        """Part of the strict validation: the numbers that belong to what orders the context."""
        if self.context_position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} with context_position='rope': rotary positions turn pairs of channels, so "
                "the width of a head is even. Change num_attention_heads or hidden_size, or take 'bias'."
            )
        if self.context_position == "rope" and not self.context_rope_theta > 1:
            raise ValueError(f"context_rope_theta={self.context_rope_theta}: a base above 1, such as 10000.")
        buckets = self.position_bias_buckets
        if self.context_position == "bias" and (buckets is None or buckets < 2):
            raise ValueError(f"position_bias_buckets={buckets} with context_position='bias': at least 2.")
        if self.context_position != "bias" and buckets:
            raise ValueError(
                f"position_bias_buckets={buckets} with context_position={self.context_position!r}, which has no bias: "
                "leave it out, or take 'bias'."
            )

    def validate_fixed_features(self) -> None:
        """Part of the strict validation: a fixed feature is a context feature of given width, an item head has
        items.
        """
        if bool(self.item_head_dim) != bool(self.item_head_size):
            raise ValueError(
                f"item_head_dim={self.item_head_dim} with item_head_size={self.item_head_size}: a head has a width "
                "and a number of items; without one both are 0."
            )
        known = [name for name in self.context_features if name in self.feature_embed_dims]
        if unknown := sorted(set(self.fixed_context_features) - set(known)):
            raise ValueError(
                f"fixed_context_features names {unknown}: give each its number of values in context_features and the "
                f"width of its table in feature_embed_dims; both name {known}."
            )

    def validate_sharing(self) -> None:
        """Part of the strict validation: sharing of context keys and values."""
        if self.context_key_value_split not in (1, 2):
            raise ValueError(
                f"context_key_value_split={self.context_key_value_split}: S_kv is 1 (v = k) or 2 (separate v)."
            )
        if not 1 <= self.num_context_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_context_layers={self.num_context_layers}: L_kv must be between 1 and num_hidden_layers="
                f"{self.num_hidden_layers}."
            )


__all__ = ["OneRecV2Config"]
