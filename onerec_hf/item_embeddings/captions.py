"""The caption loss of the OneRec Technical Report (section 2.1.1): an item's vector must tell its text to a language
model.

N items, Z width of their vectors, B items of a batch, P prefix tokens, K caption tokens, H width of the language
model.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def small_caption_model(
    texts: Sequence[str], *, vocab_size: int = 4096, hidden_size: int = 128, num_hidden_layers: int = 2, seed: int = 0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """
    A Llama with new weights and a byte-level BPE of `texts`, for machines that cannot hold a pretrained one.

    Args:
        texts: What the tokenizer is trained on.
        vocab_size (`int`, defaults to 4096): Tokens at most, and 257 at least: all bytes and the end of text.
        hidden_size (`int`, defaults to 128): H, a multiple of 8: there are 4 heads. The feed-forward is 4 H wide.
        num_hidden_layers (`int`, defaults to 2): Blocks.
        seed (`int`, defaults to 0): Of the weights.

    Returns:
        The model, float32 on the CPU, and its tokenizer.
    """
    if hidden_size < 8 or hidden_size % 8:
        raise ValueError(f"hidden_size={hidden_size}: a multiple of 8, because 4 heads have rotary positions each.")
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


class CaptionDecoder(nn.Module):
    """`L_caption_gen = -sum_k log P(t^{k+1} | t^1..t^k, M)`, per token: M, an item's vector, is P tokens ahead of its
    text.

    The report decodes with LLaMA3 from the four tokens of its QFormer.

    Args:
        texts: N captions, e.g. of `item_texts`; an empty one takes no part.
        vector_dim (`int`): Z.
        model: a causal language model, of which the weights are trained that require gradients; or a Hub name or
            folder of one, which is frozen: `ItemAlignment.fit` has steps for new weights. Default:
            `small_caption_model(texts)`.
        tokenizer: default: the one that lies where the model was loaded from.
        num_prefix_tokens (`int`, defaults to 4): P.
        max_length (`int`, defaults to 32): K, the end-of-text token of each caption included; the rest is cut off.
        seed (`int`, defaults to 0): of weights that are new.

    Raises:
        ValueError: no text at all, a tokenizer without model, or one without end-of-text token.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor

    def __init__(
        self,
        texts: Sequence[str],
        vector_dim: int,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_prefix_tokens: int = 4,
        max_length: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        if not any(texts):
            raise ValueError(
                f"a caption loss needs texts, got {len(texts)}, all empty: name text columns that have values."
            )
        if model is None and tokenizer is not None:
            raise ValueError(
                f"{type(tokenizer).__name__} was given without the model it belongs to: give both, or neither."
            )
        if model is None:
            model, tokenizer = small_caption_model([text for text in texts if text], seed=seed)
        elif isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model).requires_grad_(False)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        if (end := tokenizer.eos_token_id) is None:
            raise ValueError(f"{type(tokenizer).__name__} has no eos_token: set the one that ends a caption.")
        rows = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_length - 1)[
            "input_ids"
        ]
        rows = [[*row, end] if row else [] for row in rows]
        self.model, self.num_prefix_tokens = model, num_prefix_tokens
        width = max(map(len, rows))
        tokens = torch.tensor([row + [end] * (width - len(row)) for row in rows])
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("lengths", torch.tensor([len(row) for row in rows]), persistent=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.prefix = nn.Linear(vector_dim, num_prefix_tokens * model.config.hidden_size)

    def forward(self, vectors: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Mean over the caption tokens of `items` (B,), in nats, given their `vectors` (B, Z): a scalar."""
        tokens, lengths = self.tokens[items], self.lengths[items]  # (B, K), (B,)
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        embedded = self.model.get_input_embeddings()(tokens)
        prefix = self.prefix(vectors).view(len(items), self.num_prefix_tokens, -1).to(embedded.dtype)
        given = real.new_ones(prefix.shape[:2])
        return self.model(
            inputs_embeds=torch.cat([prefix, embedded], 1),
            attention_mask=torch.cat([given, real], 1).long(),
            labels=torch.cat([torch.full_like(given, -100, dtype=tokens.dtype), tokens.masked_fill(~real, -100)], 1),
            use_cache=False,
        ).loss
