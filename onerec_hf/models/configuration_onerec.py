"""Configurations of the OneRec models, on one page: what differs between the systems is one screen."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

NUM_SPECIAL_TOKENS = 4  # <|pad|>, <|sid_begin|>, <|sid_end|>, <|unk|>


@strict
class OneRecV2Config(PreTrainedConfig):
    r"""
    Configuration of [`OneRecV2ForCausalLM`], the lazy decoder-only model of OneRec-V2 (arXiv:2508.20900, section 2).

    The defaults are the 1B model of the paper's Table 5. Where the paper is silent, the argument says so.

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[8192, 8192, 8192]`):
            Codes per level of the semantic IDs, first level first.
        hidden_size (`int`, defaults to 1792): d_model.
        intermediate_size (`int`, *optional*): Width of the SwiGLU feed-forward. Not in the paper; `4 * hidden_size` fits its
            FLOPs at 0.5B exactly and is the default.
        num_hidden_layers (`int`, defaults to 18): Depth of the lazy decoder.
        num_attention_heads (`int`, defaults to 14): Query heads.
        num_key_value_heads (`int`, *optional*): Key/value heads of the **self**-attention. Not in the paper; defaults to
            `num_attention_heads`.
        head_dim (`int`, *optional*): Defaults to `hidden_size // num_attention_heads`.
        num_context_layers (`int`, defaults to 1): L_kv, the number of distinct context key/value sets (section 2.2.2).
        context_key_value_split (`int`, defaults to 1): S_kv; 1 shares keys and values (v = k), 2 keeps separate values.
        num_context_key_value_heads (`int`, *optional*): G_kv, key/value groups of the context. Defaults to `num_attention_heads`.
        context_embed_dim (`int`, defaults to 90): Width of the embedding of each code and each feature of a context item.
        context_features (`dict[str, int]`, *optional*): Categorical features of every context item (action type, watch-time
            bucket, author, ...): name to number of values. Value 0 stands for "unknown". Columns run in the order of the names.
        user_features (`dict[str, int]`, *optional*): Categorical features of the user, as above.
        position_bias_buckets (`int`, defaults to 32): Buckets of the learned attention bias over the age of a context item
            (1 = the most recent one); 0 switches it off. Not in the paper, which does not describe positions.
        position_bias_max_distance (`int`, defaults to 128): Ages beyond it share the last bucket.
        score_normalization (`"level"` or `"valid"`, defaults to `"level"`):
            What a code's probability is normalised over, in the loss, in beam scores, everywhere: all codes of its level (the
            papers' softmax), or the codes that continue the prefix to an existing item (a departure; needs a catalogue).
        dropout (`float`, defaults to 0.0): On context inputs, attention outputs and feed-forward outputs. Not in the paper.
    """

    model_type = "onerec_v2"
    keys_to_ignore_at_inference = ["past_key_values", "context_kv"]

    codebook_sizes: list[int] | None = None
    vocab_size: int | None = None
    hidden_size: int = 1792
    intermediate_size: int | None = None
    num_hidden_layers: int = 18
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_context_layers: int = 1
    context_key_value_split: int = 1
    num_context_key_value_heads: int | None = None
    context_embed_dim: int = 90
    context_features: dict[str, int] | None = None
    user_features: dict[str, int] | None = None
    position_bias_buckets: int = 32
    position_bias_max_distance: int = 128
    score_normalization: Literal["level", "valid"] = "level"
    dropout: float = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes or [8192] * 3)
        size = NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)
        if self.vocab_size not in (None, size):
            raise ValueError(
                f"vocab_size={self.vocab_size} does not fit codebook_sizes={self.codebook_sizes}: the vocabulary is "
                f"{NUM_SPECIAL_TOKENS} specials and every code, {size} in all. Leave vocab_size out."
            )
        self.vocab_size = size
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.num_context_key_value_heads = self.num_context_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        # by name, because config.json is written with sorted keys: the columns must mean the same after a reload
        self.context_features = dict(sorted((self.context_features or {}).items()))
        self.user_features = dict(sorted((self.user_features or {}).items()))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the strict validation: sizes that cannot work together."""
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={self.codebook_sizes}: every level needs at least one code.")
        for name in ("num_key_value_heads", "num_context_key_value_heads"):
            if self.num_attention_heads % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} must divide num_attention_heads={self.num_attention_heads}."
                )
        if self.context_key_value_split not in (1, 2):
            raise ValueError(
                f"context_key_value_split={self.context_key_value_split}: S_kv is 1 (v = k) or 2 (separate v)."
            )
        if not 1 <= self.num_context_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_context_layers={self.num_context_layers}: L_kv must be between 1 and num_hidden_layers="
                f"{self.num_hidden_layers}."
            )

    @property
    def num_levels(self) -> int:
        """L, the number of levels of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of each level; the vocabulary is [specials | level 1 | ... | level L]."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(self.num_levels)]


__all__ = ["NUM_SPECIAL_TOKENS", "OneRecV2Config"]
