"""Configurations of the OneRec models, on one page: what differs between the systems is one screen."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .parallel import DECODER_EP_PLAN, DECODER_TP_PLAN, ENCODER_EP_PLAN, ENCODER_TP_PLAN

logger = logging.get_logger(__name__)

# what transformers puts into a config that is neither a field nor a property of it
_FOREIGN = {"attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "quantization_config"}
NUM_SPECIAL_TOKENS = 4  # <|pad|>, <|sid_begin|>, <|sid_end|>, <|unk|>


@strict
class SemanticIdConfig(PreTrainedConfig):
    r"""
    What the configurations of all OneRec models share. Where the papers are silent, the argument says so.

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[8192, 8192, 8192]`):
            Codes per level of the semantic IDs, first level first.
        hidden_size (`int`): d_model.
        intermediate_size (`int`, *optional*): Width of the dense feed-forward.
        gated_mlp (`bool`): Dense feed-forward with a gate (SwiGLU, three matrices) or without (two matrices, SiLU).
        num_hidden_layers (`int`): Depth of the decoder.
        num_attention_heads (`int`): Query heads.
        num_key_value_heads (`int`, *optional*): Key/value heads of the self-attention. Not in the papers; defaults to
            `num_attention_heads`.
        head_dim (`int`, *optional*): Defaults to `hidden_size // num_attention_heads`.
        num_context_key_value_heads (`int`, *optional*): G_kv, key/value groups of the context. Defaults to
            `num_attention_heads`.
        context_embed_dim (`int`): Width of the embedding of each code and each feature of a context item.
        user_embed_dim (`int`, *optional*): Width of each user feature, by default `context_embed_dim` (Technical
            Report: 64).
        context_features (`dict[str, int]`, *optional*): Categorical features of every context item (action type,
            watch-time bucket, author, ...): name to number of values. Value 0 stands for "unknown". Columns run in the
            order of the names.
        user_features (`dict[str, int]`, *optional*): Categorical features of the user, as above.
        feature_embed_dims (`dict[str, int]`, *optional*): Widths of single features (Technical Report: 512 for the
            author).
        num_experts (`int`, defaults to 0): Routed SwiGLU experts of a mixture-of-experts block; 0 makes every block
            dense.
        num_experts_per_tok (`int`): Experts that each token is sent to.
        num_shared_experts (`int`): Experts that every token is sent to; only OneRec-V2 mentions one.
        moe_intermediate_size (`int`, *optional*): Width of an expert.
        first_dense_layers (`int`): Blocks at the start of the decoder that stay dense.
        moe_layer_step (`int`, defaults to 1): From there, every n-th block is a mixture of experts.
        router_scoring (`"softmax"` or `"sigmoid"`): How router logits become gates (OneRec eq. 2: softmax).
        normalize_gates (`bool`): Whether the gates of the chosen experts are scaled to sum 1.
        router_bias_update_rate (`float`): gamma of the loss-free balancing (DeepSeek-V3, arXiv:2412.19437); 0 turns it
            off. The papers name the method and no rate.
        score_normalization (`"level"` or `"valid"`, defaults to `"level"`):
            What a code's probability is normalised over, in the loss, in beam scores, everywhere: all codes of its
            level (the papers' softmax), or the codes that continue the prefix to an existing item (a departure; needs
            a catalogue).
        loss_reduction (`"mean"` or `"sum"`): Over the codes of a row: OneRec and the Technical Report sum, OneRec-V2
            averages.
        tie_word_embeddings (`bool`): One table for the decoder's tokens, the head and, in OneRecV1, the context's
            codes (TR 4.2.2).
        catalogue_fingerprint (`str`, *optional*): Of the catalogue saved with the model, see
            [`Catalogue.fingerprint`]; one that differs is refused on loading. None is not compared.
        dropout (`float`, defaults to 0.0): On context inputs, attention outputs and feed-forward outputs. Not in the
            papers.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache", "context_kv"]
    base_model_tp_plan = DECODER_TP_PLAN
    base_model_ep_plan = DECODER_EP_PLAN  # type: ignore[assignment]  # as transformers' own models
    session_wise: ClassVar[bool] = False  # True where one row of `input_ids` holds several items, BOS before each

    codebook_sizes: list[int] | None = None
    vocab_size: int | None = None
    hidden_size: int = 1024
    intermediate_size: int | None = None
    gated_mlp: bool = False
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_context_key_value_heads: int | None = None
    context_embed_dim: int = 128
    user_embed_dim: int | None = None
    context_features: dict[str, int] | None = None
    user_features: dict[str, int] | None = None
    feature_embed_dims: dict[str, int] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    first_dense_layers: int = 0
    moe_layer_step: int = 1
    router_scoring: Literal["softmax", "sigmoid"] = "sigmoid"
    normalize_gates: bool = True
    router_bias_update_rate: float | int = 0.001
    score_normalization: Literal["level", "valid"] = "level"
    loss_reduction: Literal["mean", "sum"] = "sum"
    catalogue_fingerprint: str | None = None
    dropout: float | int = 0.0
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
        self.intermediate_size = self.intermediate_size or (4 if self.gated_mlp else 2) * self.hidden_size
        # (2/3) 4 d made a multiple of 128 (Technical Report, section 3.2)
        self.moe_intermediate_size = self.moe_intermediate_size or -(-8 * self.hidden_size // 384) * 128
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.num_context_key_value_heads = self.num_context_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.user_embed_dim = self.user_embed_dim or self.context_embed_dim
        # by name, because config.json is written with sorted keys: the columns must mean the same after a reload
        self.context_features = dict(sorted((self.context_features or {}).items()))
        self.user_features = dict(sorted((self.user_features or {}).items()))
        self.feature_embed_dims = dict(self.feature_embed_dims or {})
        unknown = [name for name in kwargs if not name.startswith("_") and not hasattr(PreTrainedConfig, name)]
        if unknown := sorted(set(unknown) - _FOREIGN):
            logger.warning(
                f"{type(self).__name__}: this version does not know {unknown} and ignores it, so the model may "
                "compute something else than it was trained for. Update onerec_hf, or load with "
                "`trust_remote_code=True` where the package is not imported: the repository holds its own code."
            )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the strict validation: sizes that cannot work together."""
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={self.codebook_sizes}: every level needs at least one code.")
        for name in ("num_key_value_heads", "num_context_key_value_heads"):
            if self.num_attention_heads % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} must divide num_attention_heads={self.num_attention_heads}."
                )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be 1 to num_experts={self.num_experts}."
            )
        if (step := self.moe_layer_step) < 1:
            raise ValueError(f"moe_layer_step={step}: 1 makes every block a mixture, 2 every second one.")
        known = {*self.context_features, *self.user_features}
        if unknown := sorted(set(self.feature_embed_dims) - known):
            raise ValueError(f"feature_embed_dims names {unknown}; the features are {sorted(known)}.")
        for name in ("pad_token_id", "bos_token_id"):
            if (token := getattr(self, name)) is None or not 0 <= token < NUM_SPECIAL_TOKENS:
                raise ValueError(
                    f"{name}={token}: rows begin with bos_token_id and are filled with pad_token_id. Both must be "
                    f"special tokens, 0 to {NUM_SPECIAL_TOKENS - 1}."
                )

    @property
    def has_experts(self) -> bool:
        """Whether any block is a mixture of experts."""
        return any(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder block `layer_idx` is a mixture of experts."""
        beyond = layer_idx - self.first_dense_layers
        return self.num_experts > 0 and beyond >= 0 and beyond % self.moe_layer_step == 0

    @property
    def num_levels(self) -> int:
        """L, the number of levels of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of each level; the vocabulary is [specials | level 1 | ... | level L]."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(self.num_levels)]


@strict
class OneRecConfig(SemanticIdConfig):
    r"""
    Configuration of [`OneRecForCausalLM`], the session-wise encoder-decoder of OneRec (arXiv:2502.18965).

    The paper gives no widths and depths: the defaults are those of the Technical Report's 0.935B model.

    Args:
        num_session_items (`int`, defaults to 5): m, the most items of a session.
        num_encoder_layers (`int`, defaults to 4): Blocks of the bidirectional encoder over the behaviour sequence.
        max_context_items (`int`, defaults to 256): n; older items share the position embedding of the oldest one.
        context_tokens (`"code"` or `"item"`, defaults to `"code"`): What the encoder sees: every code of every item as
            a token (n * L tokens), or one token per item that concatenates its codes. The paper does not say.
        kwargs: See [`SemanticIdConfig`]. Here the defaults are 24 experts, 2 per token, softmax gates that are not
            renormalised, no shared expert and no balancing (eq. 2).
    """

    model_type = "onerec"
    base_model_tp_plan = DECODER_TP_PLAN | ENCODER_TP_PLAN
    session_wise: ClassVar[bool] = True

    num_session_items: int = 5
    num_encoder_layers: int = 4
    max_context_items: int = 256
    context_tokens: Literal["code", "item"] = "code"
    num_experts: int = 24
    router_scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize_gates: bool = False
    router_bias_update_rate: float | int = 0.0


@strict
class OneRecV1Config(SemanticIdConfig):
    r"""
    Configuration of [`OneRecV1ForCausalLM`], the encoder-decoder of the OneRec Technical Report (arXiv:2506.13695).

    The defaults are the 0.935B model of its Table 1.

    Args:
        num_encoder_layers (`int`, defaults to 4): Blocks of the encoder.
        encoder_moe (`bool`, defaults to `False`): Mixture-of-experts blocks in the encoder too (the 2.633B model).
        short_term_length (`int`, defaults to 20): L_s, the latest interactions. 0 leaves a pathway out.
        positive_length (`int`, defaults to 256): L_p, interactions with high engagement.
        lifelong_length (`int`, defaults to 2000): L_l, the compressed history.
        num_lifelong_queries (`int`, defaults to 128): N_q, tokens that the QFormer makes of the lifelong pathway.
        num_lifelong_layers (`int`, defaults to 2): N_l, its blocks.
        lifelong_residual (`bool`, defaults to `True`): Residual connections in its blocks; the report prints none.
        code_embed_dim (`int`, *optional*): Width of each code's embedding. How they become the vid vector of width d
            is not in the report: side by side, each by default `hidden_size // num_levels`, or, with
            `tie_word_embeddings`, `hidden_size` wide.
        kwargs: See [`SemanticIdConfig`]. The gate function, its normalisation and the rate of the balancing are not in
            the report: those of DeepSeek-V3.
    """

    model_type = "onerec_v1"
    base_model_tp_plan = DECODER_TP_PLAN | ENCODER_TP_PLAN
    base_model_ep_plan = DECODER_EP_PLAN | ENCODER_EP_PLAN

    num_encoder_layers: int = 4
    encoder_moe: bool = False
    short_term_length: int = 20
    positive_length: int = 256
    lifelong_length: int = 2000
    num_lifelong_queries: int = 128
    num_lifelong_layers: int = 2
    lifelong_residual: bool = True
    code_embed_dim: int | None = None
    num_experts: int = 24

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.code_embed_dim = self.code_embed_dim or self.hidden_size // (
            1 if self.tie_word_embeddings else self.num_levels
        )

    @property
    def has_experts(self) -> bool:
        """As of the decoder alone, and with `encoder_moe` of the encoder too."""
        encoder = range(self.num_encoder_layers if self.encoder_moe else 0)
        return super().has_experts or any(self.is_moe_layer(layer) for layer in encoder)

    def validate_shared_table(self) -> None:
        """Part of the strict validation: one table has one width."""
        if self.tie_word_embeddings and self.code_embed_dim != self.hidden_size:
            raise ValueError(
                f"code_embed_dim={self.code_embed_dim}: tie_word_embeddings needs hidden_size={self.hidden_size}; "
                "leave it out."
            )

    def validate_pathways(self) -> None:
        """Part of the strict validation: lengths of the pathways."""
        if min(self.pathway_lengths.values()) < 0 or not any(self.pathway_lengths.values()):
            raise ValueError(f"pathway lengths {self.pathway_lengths}: none may be negative, and one must be above 0.")
        if self.lifelong_length and self.num_lifelong_queries < 1:
            raise ValueError(
                f"num_lifelong_queries={self.num_lifelong_queries}: the lifelong pathway needs at least one."
            )

    @property
    def pathway_lengths(self) -> dict[str, int]:
        """Items of each pathway, in the order in which they stand in `context_ids`."""
        lengths = (self.short_term_length, self.positive_length, self.lifelong_length)
        return dict(zip(("short_term", "positive", "lifelong"), lengths))


__all__ = ["NUM_SPECIAL_TOKENS", "OneRecConfig", "OneRecV1Config", "SemanticIdConfig"]
