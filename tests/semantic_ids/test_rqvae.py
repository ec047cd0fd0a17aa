"""RQ-VAE: the loss term by term, gradients that stop where the paper stops them, dead codes, and the calls of
k-means.
"""

import json

import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import (
    RQVAE,
    EmbeddingFiles,
    ResidualKMeans,
    load_quantizer,
    quality_report,
    resolve_collisions,
)

from .test_semantic_ids import clustered_items

SMALL = {
    "num_levels": 2,
    "codebook_size": 8,
    "latent_dim": 4,
    "hidden_sizes": (16,),
    "batch_size": 128,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def items() -> torch.Tensor:
    return clustered_items(500, 10, 12)


@pytest.fixture(scope="module")
def quantizer(items) -> RQVAE:
    return RQVAE(**SMALL, num_epochs=30).fit(items, progress=False)


def test_loss_by_hand():
    """Identity for encoder and decoder: z = x = (3, 1), codes (2, 0) and (0, 1) or (4, 4); no level is exact."""
    quantizer = RQVAE(2, 2, latent_dim=2, hidden_sizes=(), beta=0.25)
    quantizer.fit(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), progress=False)
    network = quantizer.network
    network.center.zero_(), network.scale.fill_(1.0)
    with torch.no_grad():
        for linear in (network.encoder[0], network.decoder[0]):
            linear.weight.copy_(torch.eye(2)), linear.bias.zero_()
    codebooks = torch.tensor([[[2.0, 0.0], [9.0, 9.0]], [[4.0, 4.0], [0.0, 1.0]]], requires_grad=True)
    network.zero_grad()
    loss, codes = quantizer.loss(torch.tensor([[3.0, 1.0]]), codebooks)
    assert codes.tolist() == [[0, 1]]
    # r_1 = (3, 1), minus (2, 0): 2; r_2 = (1, 1), minus (0, 1): 1; x^ = (2, 1): 1
    assert loss.item() == pytest.approx(1 + 1.25 * (2 + 1))
    loss.backward()
    # codebooks: 2 (c - r) of the chosen codes, nothing from the reconstruction
    assert codebooks.grad.tolist() == [[[-2.0, -2.0], [0.0, 0.0]], [[0.0, 0.0], [-2.0, 0.0]]]
    # encoder bias: commitment .25 * 2 * (r_1 - c_1 + r_2 - c_2) and, straight through, 2 * (x^ - x)
    assert network.encoder[0].bias.grad.tolist() == [0.5 * 2 - 2, 0.5 * 1 + 0]


def test_training_beats_its_start_and_uses_its_codes(items, quantizer):
    start = RQVAE(**(SMALL | {"learning_rate": 0.0}), num_epochs=1).fit(items, progress=False)
    reports = [quality_report(model.train_codes, items, model) for model in (start, quantizer)]
    assert reports[1]["reconstruction_relative"] < 0.5 * reports[0]["reconstruction_relative"]
    assert reports[1]["reconstruction_relative"] < 0.5
    assert reports[1]["utilisation"] == [1.0, 1.0]
    decoded = quantizer.decode(quantizer.train_codes)
    error = (items - decoded).square().mean().item()
    assert reports[1]["reconstruction_mse"] == pytest.approx(error, rel=1e-4)
    assert torch.equal(quantizer.encode(items), quantizer.train_codes)


def test_dead_codes_come_back_to_life(items):
    """Far from every latent, a code gets no gradient: only the reset brings it back."""
    for reset in (True, False):
        quantizer = RQVAE(**SMALL, num_epochs=8, reset_dead_codes=reset)
        fit = quantizer.latent.fit

        def with_dead_codes(latents, fit=fit, latent=quantizer.latent):
            fit(latents)
            latent.codebooks[0, 4:] = 1e3
            return latent

        quantizer.latent.fit = with_dead_codes
        quantizer.fit(items, progress=False)
        alive = len(quantizer.train_codes[:, 0].unique())
        assert alive > 5 if reset else alive == 4


def test_a_reset_touches_dead_codes_alone(items, quantizer):
    codebooks = torch.nn.Parameter(quantizer.latent.codebooks.clone())
    optimizer = torch.optim.AdamW([codebooks])
    codebooks.sum().backward()
    optimizer.step()
    before, dead = codebooks.detach().clone(), torch.zeros(2, 8, dtype=torch.bool)
    dead[1, [2, 5]] = True
    quantizer._reset(codebooks, dead, items, optimizer, torch.Generator().manual_seed(0))
    moved = (codebooks != before).any(2)
    assert torch.equal(moved, dead)
    moments = optimizer.state[codebooks]["exp_avg"]
    assert (moments[dead] == 0).all() and (moments[~dead] != 0).all()


def test_repeatable_and_saved(items, quantizer, tmp_path):
    again = RQVAE(**SMALL, num_epochs=30).fit_encode(items.numpy())
    assert torch.equal(again, quantizer.train_codes)
    quantizer.save_pretrained(tmp_path)
    loaded = load_quantizer(tmp_path)
    assert isinstance(loaded, RQVAE)
    assert torch.equal(loaded.encode(items), quantizer.train_codes)
    assert torch.equal(loaded.decode(quantizer.train_codes), quantizer.decode(quantizer.train_codes))
    with pytest.raises(ValueError, match="another quantizer"):
        ResidualKMeans.from_pretrained(tmp_path)
    kmeans = ResidualKMeans(2, 8, num_iterations=1, num_full_iterations=1).fit(items)
    kmeans.save_pretrained(tmp_path)
    assert isinstance(load_quantizer(tmp_path), ResidualKMeans)
    with pytest.raises(ValueError, match="load_quantizer"):
        RQVAE.from_pretrained(tmp_path)
    (tmp_path / "quantizer_config.json").write_text(json.dumps({"quantizer_type": "fsq"}))
    with pytest.raises(ValueError, match="'fsq'"):
        load_quantizer(tmp_path)


OTHERS = [{"latent_dim": 3}, {"codebook_size": 9}, {"hidden_sizes": [5]}, {"embedding_dim": 2}]


@pytest.mark.parametrize("change", OTHERS)
def test_two_files_of_different_quantizers_are_refused(change, items, quantizer, tmp_path):
    quantizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "quantizer_config.json").read_text())
    assert change.keys() <= config.keys()
    (tmp_path / "quantizer_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="The two files are not of one quantizer, save it again"):
        load_quantizer(tmp_path)


def test_files_are_trained_on_as_the_same_items_in_memory(items, quantizer, tmp_path):
    for number, part in enumerate(items.split(200)):
        np.save(tmp_path / f"{number}.npy", part.numpy())
    files = EmbeddingFiles(sorted(tmp_path.glob("*.npy")))
    streamed = RQVAE(**SMALL, num_epochs=30).fit(files, progress=False)
    found, expected = (quality_report(q.train_codes, x, q) for q, x in ((streamed, files), (quantizer, items)))
    assert found["reconstruction_mse"] == pytest.approx(expected["reconstruction_mse"], rel=0.05)
    assert torch.equal(streamed.encode(items), streamed.train_codes)
    free = resolve_collisions(streamed.train_codes[:12], streamed, EmbeddingFiles([files.paths[0]]), policy="keep")
    assert torch.equal(free, streamed.train_codes[:12])


@pytest.mark.parametrize("policy", ["extra_level", "next_free"])
def test_collisions_are_resolved(items, quantizer, policy):
    items = items[:12]
    codes = resolve_collisions(quantizer.encode(items), quantizer, items, policy=policy)
    assert len(codes.unique(dim=0)) == 12
    assert torch.equal(codes[:, 0], quantizer.encode(items)[:, 0])


def test_next_free_measures_in_the_latent_space(items, quantizer):
    codes = quantizer.encode(items[:12])
    expected = resolve_collisions(codes, quantizer.latent, quantizer.encoder_outputs(items[:12]), policy="next_free")
    assert torch.equal(resolve_collisions(codes, quantizer, items[:12], policy="next_free"), expected)


def test_errors(items, quantizer):
    with pytest.raises(RuntimeError, match="not trained"):
        RQVAE().encode(items)
    with pytest.raises(ValueError, match="width 3"):
        quantizer.encode(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="cannot fill 256 codes"):
        RQVAE(latent_dim=4, hidden_sizes=()).fit(items[:20])
    with pytest.raises(ValueError, match="num_epochs"):
        RQVAE(num_epochs=0)
