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
        position_bias_buckets (`int`, defaults to 32): Buckets of the learned attention bias over the age of a context
            item (1 = the most recent one); 0 switches it off. Not in the paper, which does not describe positions. On
            a GPU the mask that it makes has no flash kernel: large models train faster without (docs/results.md).
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
    position_bias_buckets: int = 32
    position_bias_max_distance: int = 128
    num_experts_per_tok: int = 3
    num_shared_experts: int = 1
    first_dense_layers: int = 2
    loss_reduction: Literal["mean", "sum"] = "mean"
    fixed_context_features: list[str] | None = None
    context_dropout: float | None = None
    item_head_dim: int = 0
    item_head_size: int = 0
    item_loss_weight: float = 1.0

    def __post_init__(self, **kwargs):
        self.fixed_context_features = list(self.fixed_context_features or [])
        self.context_dropout = self.dropout if self.context_dropout is None else self.context_dropout
        super().__post_init__(**kwargs)

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
