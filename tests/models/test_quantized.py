"""Weights of 8 bits by torchao, as transformers loads them: the search stays constrained, and a saved folder loads."""

import pytest
import torch
from transformers import TorchAoConfig

from onerec_hf.recommender import Recommender

from ..tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model

quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: `make test-extras`")


def searched(model, catalogue):
    """The ten best of five users, and what the item head says, where there is one."""
    context = tiny_context(catalogue, model, batch=5)
    if model.config.context_features:
        context["context_features"] = torch.arange(30).view(5, 6, 1)
    heads = model.score_items(**context) if getattr(model, "item_head", None) else None
    return model.recommend_items(10, **context), heads


@pytest.mark.parametrize("kind", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "item head"])
def test_eight_bits_search_and_are_saved(architecture, kind, tmp_path):
    catalogue, settings = tiny_catalogue(), {}
    if architecture == "item head":
        settings = {"context_features": {"item_vectors": 66}, "fixed_context_features": ["item_vectors"]}
        settings |= {"feature_embed_dims": {"item_vectors": 16}, "item_head_dim": 16, "item_head_size": 65}
    model = tiny_model(catalogue, architecture="v2" if settings else architecture, **settings)
    model.save_pretrained(tmp_path / "whole")
    found, heads = searched(model, catalogue)
    config = TorchAoConfig(getattr(quantization, kind)())
    small = type(model).from_pretrained(tmp_path / "whole", quantization_config=config).eval()
    kinds = [type(weight).__name__ for weight in small.parameters()]
    assert sum(name in ("Float8Tensor", "Int8Tensor") for name in kinds) >= 10
    other, other_heads = searched(small, catalogue)
    assert (found.items[:, :, None] == other.items[:, None]).any(2).float().mean() > 0.7
    assert 0 < (found.scores - other.scores).abs().mean() < 0.5  # nats: it is another model, but a near one
    assert torch.equal(other.items.sort(1).values.diff(dim=1) > 0, torch.ones(5, 9, dtype=torch.bool))
    if heads is not None:
        assert (heads.exp() - other_heads.exp()).abs().sum(1).mean() < 0.3  # twice the total variation
    small.save_pretrained(tmp_path / "small")
    again, _ = searched(type(model).from_pretrained(tmp_path / "small").eval(), catalogue)
    assert torch.equal(again.items, other.items)
    torch.testing.assert_close(again.scores, other.scores)


def test_a_recommender_passes_the_settings_on(tmp_path):
    model = tiny_model(tiny_catalogue())
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    recommender = Recommender.from_pretrained(tmp_path, quantization_config=config)
    assert any(type(weight).__name__ == "Int8Tensor" for weight in recommender.model.parameters())
    assert len(recommender.recommend([[1001, 1002]], k=5)[0]) == 5
