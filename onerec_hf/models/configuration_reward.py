"""Configurations of the reward models: the session-wise one of OneRec, and the P-Score of the Technical Report."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_onerec import NUM_SPECIAL_TOKENS


@strict
class RewardConfig(PreTrainedConfig):
    r"""
    What the configurations of both reward models share. The papers give no sizes.

    Args:
        codebook_sizes (`list[int]`, *optional*, defaults to `[8192, 8192, 8192]`): Codes per level, as the policy's.
        targets (`list[str]`, *optional*): Objectives, one tower each, in the order of `labels`; any names.
        target_weights (`list[float]`, *optional*): Weight of each objective in every loss, w^xtr of the P-Score. Not
            in the papers, which tune them; default 1.
        hidden_size (`int`, defaults to 64): D, width of every representation.
        tower_size (`int`, *optional*): Width of a tower's hidden layer; defaults to `hidden_size`.
        num_attention_heads (`int`, defaults to 4): Heads of the target attention (and of the session's
            self-attention).
        context_embed_dim (`int`, defaults to 16): Width of the embedding of each code and each feature.
        user_embed_dim (`int`, *optional*): Width of the embedding of each user feature; defaults to
            `context_embed_dim`.
        context_features (`dict[str, int]`, *optional*): Categorical features of every behaviour: name to number of
            values. Value 0 stands for "unknown". Columns run in the order of the names.
        user_features (`dict[str, int]`, *optional*): Categorical features of the user, as above.
        item_features (`dict[str, int]`, *optional*): Categorical features of every candidate in its request (author,
            duration bucket, hour, ...), as above.
        item_numbers (`list[str]`, *optional*): Numeric features of every candidate in its request, centred and of
            order 1 (log-odds of past rates, log counts). Rare objectives need them: a table of buckets is learned from
            too few positives. Columns run in the order of the sorted names.
        feature_embed_dims (`dict[str, int]`, *optional*): Widths of single features, by name, instead of the two
            above.
        position_bias_buckets (`int`, defaults to 32): Buckets of the learned attention bias over the age of a
            behaviour.
        position_bias_max_distance (`int`, defaults to 128): Ages beyond it share the last bucket.
        catalogue_fingerprint (`str`, *optional*): Of the catalogue it was trained with ([`Catalogue.fingerprint`]);
            policies with another one are refused. None is not compared.
        dropout (`float`, defaults to 0.0): On embeddings and tower inputs.
    """

    keys_to_ignore_at_inference = ["loss_sums"]  # of `Trainer.predict`

    codebook_sizes: list[int] | None = None
    targets: list[str] | None = None
    target_weights: list[float | int] | None = None
    hidden_size: int = 64
    tower_size: int | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    num_context_key_value_heads: int | None = None
    head_dim: int | None = None
    context_embed_dim: int = 16
    user_embed_dim: int | None = None
    context_features: dict[str, int] | None = None
    user_features: dict[str, int] | None = None
    item_features: dict[str, int] | None = None
    item_numbers: list[str] | None = None
    feature_embed_dims: dict[str, int] | None = None
    position_bias_buckets: int = 32
    position_bias_max_distance: int = 128
    catalogue_fingerprint: str | None = None
    dropout: float | int = 0.0
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes or [8192] * 3)
        self.targets = list(self.targets or self.default_targets)
        self.target_weights = [float(weight) for weight in self.target_weights or [1] * len(self.targets)]
        self.tower_size = self.tower_size or self.hidden_size
        self.num_key_value_heads = self.num_context_key_value_heads = self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.user_embed_dim = self.user_embed_dim or self.context_embed_dim
        # by name, because config.json is written with sorted keys: the columns must mean the same after a reload
        for name in ("context_features", "user_features", "item_features"):
            setattr(self, name, dict(sorted((getattr(self, name) or {}).items())))
        self.item_numbers = sorted(self.item_numbers or [])
        self.feature_embed_dims = dict(self.feature_embed_dims or {})
        super().__post_init__(**kwargs)

    def validate_targets(self) -> None:
        """Part of the strict validation: one weight per objective, each named once."""
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets={self.targets}: every objective may be named once.")
        if len(self.target_weights) != len(self.targets) or min(self.target_weights) < 0:
            raise ValueError(
                f"target_weights={self.target_weights}: one weight of 0 or more is needed for each of {self.targets}."
            )
        known = {*self.context_features, *self.user_features, *self.item_features}
        if unknown := sorted(set(self.feature_embed_dims) - known):
            raise ValueError(f"feature_embed_dims names {unknown}; the features are {sorted(known)}.")

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Objectives where none are named."""
        return ("swt", "vtr", "wtr", "ltr")

    @property
    def num_levels(self) -> int:
        """L, the number of levels of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def vocab_size(self) -> int:
        """Token ids are the policy's: [specials | level 1 | ... | level L]."""
        return NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of each level."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(self.num_levels)]


@strict
class OneRecSessionRewardConfig(RewardConfig):
    r"""
    Configuration of [`OneRecSessionRewardModel`], the session-wise reward model of OneRec (arXiv:2502.18965, eq. 5 to
    7).

    Args:
        reward_weights (`list[float]`, *optional*): How the towers become the one reward R(u, S) that ranks sessions: a
            weighted sum. The paper does not say how they are joined; default 1 for each.
        kwargs: See [`RewardConfig`]; the targets default to the paper's swt, vtr, wtr, ltr.
    """

    model_type = "onerec_session_reward"

    reward_weights: list[float | int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.reward_weights = [float(weight) for weight in self.reward_weights or [1] * len(self.targets)]

    def validate_reward_weights(self) -> None:
        """Part of the strict validation: one weight per objective."""
        if len(self.reward_weights) != len(self.targets):
            raise ValueError(f"reward_weights={self.reward_weights}: one weight is needed for each of {self.targets}.")


@strict
class OneRecPScoreConfig(RewardConfig):
    r"""
    Configuration of [`OneRecPScoreModel`], the P-Score of the OneRec Technical Report (arXiv:2506.13695).

    Args:
        fused_weight (`float`, defaults to 1.0): Weight of the fused score's loss beside the towers' auxiliary losses.
            Not in the paper.
        kwargs: See [`RewardConfig`]; the targets default to the paper's ctr, lvtr, ltr, vtr.
    """

    model_type = "onerec_p_score"

    fused_weight: float | int = 1.0

    @property
    def default_targets(self) -> tuple[str, ...]:
        return ("ctr", "lvtr", "ltr", "vtr")


__all__ = ["OneRecPScoreConfig", "OneRecSessionRewardConfig", "RewardConfig"]
