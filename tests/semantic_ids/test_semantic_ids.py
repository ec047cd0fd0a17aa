"""Residual k-means: exact balance, hand-worked examples, nearest centroids by brute force, files, errors."""

import json
import math

import numpy as np
import pytest
import torch

from onerec_hf.semantic_ids import EmbeddingFiles, ResidualKMeans, kmeans, quality_report, residual, resolve_collisions
from onerec_hf.semantic_ids import distances as blocks_module
from onerec_hf.semantic_ids.balance import Prices, balanced_sizes, cheapest, enforce_sizes, smallest
from onerec_hf.semantic_ids.exchange import exchange_items
from onerec_hf.semantic_ids.kmeans import kmeans_plus_plus, train_codebook

from ..numeric import assert_close


def clustered_items(num_items: int, width: int, num_clusters: int, seed: int = 0) -> torch.Tensor:
    """Gaussian clusters of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(num_clusters, width, generator=generator)
    shares = torch.rand(num_clusters, generator=generator).square() + 0.02
    cluster = torch.multinomial(shares, num_items, replacement=True, generator=generator)
    return centers[cluster] + 0.5 * torch.randn(num_items, width, generator=generator)


@pytest.fixture(scope="module")
def items() -> torch.Tensor:
    return clustered_items(603, 8, 20)


@pytest.fixture(scope="module")
def quantizer(items) -> ResidualKMeans:
    return ResidualKMeans(num_levels=3, codebook_size=16, num_iterations=5, num_full_iterations=2).fit(items)


def test_one_dimension_by_hand():
    """Balanced: {0, 1, 2} and {10, 11, 51}, means 1 and 24. Plain: 51 is alone."""
    items = torch.tensor([[51.0], [0.0], [10.0], [2.0], [11.0], [1.0]])
    balanced = ResidualKMeans(num_levels=1, codebook_size=2).fit(items)
    assert sorted(balanced.codebooks.flatten().tolist()) == [1.0, 24.0]
    low = int(balanced.codebooks[0].argmin())
    assert balanced.train_codes[:, 0].tolist() == [1 - low, low, 1 - low, low, 1 - low, low]
    # deployed rule: 10 and 11 are nearer to 1 than to 24
    assert balanced.encode(items)[:, 0].tolist() == [1 - low, low, low, low, low, low]
    plain = ResidualKMeans(num_levels=1, codebook_size=2, balanced=False, seed=3).fit(items)
    assert sorted(plain.codebooks.flatten().tolist()) == pytest.approx([4.8, 51.0])


@pytest.mark.parametrize("num_items, size", [(64, 8), (67, 8), (103, 10), (8, 8), (9, 8), (300, 2)])
def test_every_code_of_every_level_is_equally_full(num_items, size):
    codes = ResidualKMeans(2, size, num_iterations=2, num_full_iterations=1).fit_encode(
        clustered_items(num_items, 3, 4)
    )
    expected = [num_items // size + (code < num_items % size) for code in range(size)]
    for level in range(2):
        assert torch.bincount(codes[:, level], minlength=size).tolist() == expected


def test_copies_of_one_item_are_spread_evenly():
    items = torch.cat([torch.ones(90, 4), clustered_items(110, 4, 3)])
    quantizer = ResidualKMeans(3, 8, num_iterations=3).fit(items)
    assert quantizer.codebooks.isfinite().all()
    for level in range(3):
        assert torch.bincount(quantizer.train_codes[:, level]).tolist() == [25] * 8
    assert torch.bincount(ResidualKMeans(1, 8).fit_encode(torch.zeros(80, 4))[:, 0]).tolist() == [10] * 8


def test_centroids_are_the_means_of_the_residuals_of_their_items(items, quantizer):
    residuals = items.clone()
    for level, centroids in enumerate(quantizer.codebooks):
        codes = quantizer.train_codes[:, level]
        means = torch.stack([residuals[codes == code].mean(dim=0) for code in range(16)])
        torch.testing.assert_close(centroids, means)
        residuals = residuals - centroids[codes]


def algorithm_1(items, centroids, num_iterations):
    """OneRec's Algorithm 1, line by line: U, its sort by distance, the first w, their mean; the cheapest iteration's
    codes.
    """
    best, lowest, codebook_size = None, math.inf, len(centroids)
    for _ in range(num_iterations):
        unassigned, codes, error = list(range(len(items))), [0] * len(items), 0.0
        for k in range(codebook_size):
            w = len(items) // codebook_size + (k < len(items) % codebook_size)
            unassigned.sort(key=lambda i: ((items[i] - centroids[k]) ** 2).sum())
            taken, unassigned = unassigned[:w], unassigned[w:]
            centroids[k] = items[taken].mean(0)
            error += ((items[taken] - centroids[k]) ** 2).sum()
            for i in taken:
                codes[i] = k
        if error < lowest:
            best, lowest = codes, error
    return best


@pytest.mark.parametrize("num_items", [60, 62])
def test_greedy_clusters_are_algorithm_1(num_items):
    items = torch.randn(num_items, 3, generator=torch.Generator().manual_seed(5))
    for iterations in (1, 2, 9):
        found = ResidualKMeans(1, 5, balanced="greedy", num_iterations=0, num_full_iterations=iterations).fit(items)
        start = torch.randperm(num_items, generator=torch.Generator().manual_seed(0))[:5]
        centered = (items - items.mean(0)).double().numpy()
        codes = algorithm_1(centered, centered[start.numpy()].copy(), iterations)
        assert found.train_codes[:, 0].tolist() == codes
        means = torch.stack([items[found.train_codes[:, 0] == code].mean(0) for code in range(5)])
        assert_close(found.codebooks[0], means)


def test_greedy_is_kept_and_a_typo_is_refused(tmp_path):
    items = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    ResidualKMeans(2, 4, balanced="greedy", num_iterations=1, num_full_iterations=1).fit(items).save_pretrained(
        tmp_path
    )
    assert ResidualKMeans.from_pretrained(tmp_path).balanced == "greedy"
    with pytest.raises(ValueError, match="'greedy'"):
        ResidualKMeans(balanced="gready")


@pytest.mark.parametrize(("columns", "count"), [(8192, 16), (8192, 2), (4096, 16), (4097, 2), (512, 2), (40, 16)])
def test_the_smallest_numbers_of_many_columns(columns, count):
    torch.manual_seed(0)
    rows = torch.randn(50, columns)
    rows[:10] = rows[:10].round()  # ties
    rows[10:20, 64:96] -= 10.0  # all in one chunk
    rows[20] = torch.inf
    values, indices = smallest(rows, count)
    torch.testing.assert_close(values, rows.sort(dim=1).values[:, :count], rtol=0, atol=0)
    assert torch.equal(rows.gather(1, indices), values)
    assert all(len(set(row)) == count for row in indices.tolist())


def test_balanced_assignment_is_nearly_the_cheapest():
    """Against the exact solution of the assignment problem with the same centroids."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    items = clustered_items(400, 4, 8)
    centroids, codes = train_codebook(
        items, 8, balanced=True, num_iterations=10, num_full_iterations=4, generator=torch.Generator().manual_seed(0)
    )
    costs = torch.cdist(items, centroids).square().repeat_interleave(50, dim=1)
    rows, columns = scipy_optimize.linear_sum_assignment(costs.numpy())
    exact = costs[rows, columns].sum().item()
    assert (items - centroids[codes]).square().sum().item() < 1.01 * exact

    greedy = seated(items, centroids, torch.zeros(8), balanced_sizes(400, 8))
    assert (items - centroids[greedy]).square().sum().item() > 1.03 * exact  # what the prices are for


def seated(items, centroids, prices, sizes):
    costs, clusters = cheapest(items, centroids, prices)
    return enforce_sizes(items, centroids, prices, clusters[0].long(), costs[1] - costs[0], sizes)


def exact_cost(items, centroids):
    """Of the cheapest assignment with balanced sizes: one column per place, the Hungarian method."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    slots = torch.arange(len(centroids)).repeat_interleave(balanced_sizes(len(items), len(centroids)))
    costs = torch.cdist(items.double(), centroids.double()).square()[:, slots].numpy()
    return costs[scipy_optimize.linear_sum_assignment(costs)].sum()


def cost_of(items, centroids, codes):
    return (items.double() - centroids[codes].double()).square().sum().item()


def three_clumps(num_items, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(3, 4, generator=generator)
    clump = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), num_items, replacement=True, generator=generator)
    return centers[clump] + torch.randn(num_items, 4, generator=generator)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_items", [160, 163])
def test_after_the_exchanges_no_assignment_is_cheaper(num_items, seed):
    """Whatever assignment they start from; the bound is the documented 1e-6 of the mean distance per item."""
    items = three_clumps(num_items, seed)
    centroids, sizes = items[:8].clone(), balanced_sizes(num_items, 8)
    shuffled = torch.arange(8).repeat_interleave(sizes)[torch.randperm(num_items)]
    exact = exact_cost(items, centroids)
    assert cost_of(items, centroids, shuffled) > 2 * exact
    found = exchange_items(items, centroids, shuffled)
    assert torch.bincount(found).tolist() == torch.bincount(shuffled).tolist()
    assert cost_of(items, centroids, found) <= exact * (1 + 1e-5)


def test_a_ring_of_three_by_hand():
    """Every item sits one cluster away from its own, so that only a ring of all three brings each home."""
    items = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    centroids = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert exchange_items(items, centroids, torch.tensor([1, 2, 0])).tolist() == [2, 0, 1]


def test_balanced_fits_are_exact_where_they_are_small_and_within_a_hundredth_elsewhere(monkeypatch):
    items = three_clumps(400, 0)
    items -= items.mean(0)
    settings = {"balanced": True, "num_iterations": 6, "num_full_iterations": 2}

    def gap():
        centroids, codes = train_codebook(items, 8, generator=torch.Generator().manual_seed(0), **settings)
        means = torch.stack([items[codes == code].mean(0) for code in range(8)])
        assert_close(centroids, means)
        return cost_of(items, centroids, codes)

    # Lloyd's algorithm with exact assignments, from the same start
    start = items[torch.randperm(400, generator=torch.Generator().manual_seed(0))[:8]]
    scipy_optimize, lowest = pytest.importorskip("scipy.optimize"), float("inf")
    for _ in range(8):
        slots = torch.arange(8).repeat_interleave(50)
        codes = slots[scipy_optimize.linear_sum_assignment(torch.cdist(items, start).square()[:, slots].numpy())[1]]
        start = torch.stack([items[codes == code].mean(0) for code in range(8)])
        lowest = min(lowest, cost_of(items, start, codes))
    assert gap() <= 1.001 * lowest

    # as if it were a large fit: whatever is seated must be within 1% of the cheapest for the centroids of that moment
    seen = []
    real = kmeans._largest_gap

    def check(items, centroids, prices, cheapest, seated):
        bound = real(items, centroids, prices, cheapest, seated)
        seen.append(bound)
        assert cost_of(items, centroids, seated) <= (1 + 1e-4) * exact_cost(items, centroids) / max(1 - bound, 1e-9)
        return bound

    monkeypatch.setattr(kmeans, "_FEW_DISTANCES", 0)
    monkeypatch.setattr(kmeans, "_largest_gap", check)
    gap()
    assert len(seen) >= 2 and max(seen) > 0.01  # prices alone are worse on separated clumps


def test_prices_fill_clusters_evenly():
    items = clustered_items(2000, 4, 10)
    prices, centroids = Prices(balanced_sizes(2000, 10)), items[:10]
    before = torch.bincount(cheapest(items, centroids, prices.values)[1][0], minlength=10)
    for _ in range(5):
        prices.solve(items, centroids)
    after = torch.bincount(cheapest(items, centroids, prices.values)[1][0], minlength=10)
    assert (before - 200).abs().max() > 100
    assert (after - 200).abs().max() < 20


def test_enforce_sizes_by_hand():
    """Three items ask for the centroid at 0, which has room for two: 0.2 loses least by going to the one at 10."""
    items, centroids = torch.tensor([[0.2], [0.0], [0.1], [10.0]]), torch.tensor([[0.0], [10.0]])
    costs, clusters = cheapest(items, centroids, torch.zeros(2))
    assert clusters.tolist() == [[0, 0, 0, 1], [1, 1, 1, 0]]
    torch.testing.assert_close(costs[1] - costs[0], torch.tensor([96.0, 100.0, 98.0, 100.0]))
    assert seated(items, centroids, torch.zeros(2), torch.tensor([2, 2])).tolist() == [1, 0, 0, 1]


def test_kmeans_plus_plus_takes_one_item_per_group_and_no_item_twice():
    groups = torch.arange(20.0).repeat_interleave(30).unsqueeze(1)
    items = 100 * groups + torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    start = kmeans_plus_plus(items, 20, torch.Generator().manual_seed(1))
    assert sorted((start[:, 0] / 100).round().tolist()) == list(
        range(20)
    )  # at random all 20 would be hit once in 10^8 times
    few = torch.tensor([[0.0], [0.0], [0.0], [1.0], [5.0]])
    assert sorted(kmeans_plus_plus(few, 3, torch.Generator().manual_seed(0))[:, 0].tolist()) == [0.0, 1.0, 5.0]
    assert len(kmeans_plus_plus(few, 5, torch.Generator().manual_seed(0))) == 5  # only three differ: two are repeated


def test_kmeans_plus_plus_draws_by_squared_distance():
    """From 0 the next one of two draws is 1, 3 or 10 with p = 1/110, 9/110, 100/110; the better of both leaves less:
    10, then 3.
    """
    items = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    counts = torch.zeros(11)
    for seed in range(2000):
        first, second = kmeans_plus_plus(items, 2, torch.Generator().manual_seed(seed))[:, 0].tolist()
        if first == 0:
            counts[int(second)] += 1
    torch.testing.assert_close(
        counts[[1, 3, 10]] / counts.sum(),
        torch.tensor([(1 / 110) ** 2, (10 / 110) ** 2 - (1 / 110) ** 2, 1 - (10 / 110) ** 2]),
        atol=0.02,
        rtol=0,
    )


def test_plain_k_means_resets_empty_codes():
    items = torch.cat([torch.zeros(60, 1), torch.full((60, 1), 10.0), torch.tensor([[20.0], [30.0]])])
    quantizer = ResidualKMeans(1, 4, balanced=False, seed=0).fit(items)
    assert sorted(quantizer.codebooks.flatten().tolist()) == pytest.approx([0.0, 10.0, 20.0, 30.0], abs=1e-5)
    assert torch.equal(quantizer.train_codes, quantizer.encode(items))


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy(), lambda x: x.double(), lambda x: x.half()])
def test_encode_takes_the_nearest_centroid(items, quantizer, convert):
    given = convert(items[:50])
    residuals = torch.as_tensor(given).float().numpy().astype(np.float64)
    codes = quantizer.encode(given).numpy()
    for level, centroids in enumerate(quantizer.codebooks.double().numpy()):
        distances = ((residuals[:, None] - centroids[None]) ** 2).sum(axis=2)
        np.testing.assert_array_equal(codes[:, level], distances.argmin(axis=1))
        residuals = residuals - centroids[codes[:, level]]


def test_small_blocks_change_nothing(items, quantizer, monkeypatch):
    monkeypatch.setattr(blocks_module, "_CPU_ELEMENTS", 100)
    assert len(list(blocks_module.row_blocks(603, 16, items.device))) == 101  # 6 rows of 16 columns at a time
    again = ResidualKMeans(num_levels=3, codebook_size=16, num_iterations=5, num_full_iterations=2).fit(items)
    torch.testing.assert_close(again.codebooks, quantizer.codebooks)
    assert torch.equal(again.encode(items), quantizer.encode(items))


def test_decode_by_hand():
    quantizer = ResidualKMeans(num_levels=2, codebook_size=2)
    quantizer.codebooks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [-0.25, 0.0]]])
    assert quantizer.decode(torch.tensor([[0, 1], [1, 0]])).tolist() == [[0.75, 0.0], [0.5, 1.5]]
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*decodes \(num_items, 2\).*codes\[:, :2\]"):
        quantizer.decode(torch.tensor([[0, 1, 0]]))
    with pytest.raises(ValueError, match=r"from 0 to 2; they must be in \[0, 2\)"):
        quantizer.decode(torch.tensor([[0, 2]]))


@pytest.mark.parametrize("balanced", [True, False])
def test_error_falls_with_every_level(items, balanced):
    errors = []
    for levels in (1, 2, 3):
        quantizer = ResidualKMeans(levels, 16, balanced=balanced, num_iterations=5).fit(items)
        errors.append(quality_report(quantizer.encode(items), items, quantizer)["reconstruction_relative"])
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_levels_do_not_depend_on_how_many_follow(items, quantizer):
    shorter = ResidualKMeans(num_levels=2, codebook_size=16, num_iterations=5, num_full_iterations=2).fit(items)
    assert torch.equal(shorter.codebooks, quantizer.codebooks[:2])


def test_same_seed_same_result(items, quantizer):
    settings = {"num_levels": 3, "codebook_size": 16, "num_iterations": 5, "num_full_iterations": 2}
    given = items.clone()
    same = ResidualKMeans(**settings).fit(given)
    assert torch.equal(same.codebooks, quantizer.codebooks)
    assert torch.equal(same.train_codes, quantizer.train_codes)
    assert torch.equal(given, items)  # not changed in place
    assert not torch.equal(ResidualKMeans(**settings, seed=1).fit(items).codebooks, quantizer.codebooks)


def test_save_and_load(items, quantizer, tmp_path):
    quantizer.save_pretrained(tmp_path / "repo")
    assert sorted(path.name for path in (tmp_path / "repo").iterdir()) == [
        "quantizer.safetensors",
        "quantizer_config.json",
    ]
    loaded = ResidualKMeans.from_pretrained(tmp_path / "repo")
    assert torch.equal(loaded.codebooks, quantizer.codebooks)
    assert torch.equal(loaded.encode(items), quantizer.encode(items))
    assert loaded.train_codes is None
    for name in ("num_levels", "codebook_size", "balanced", "num_iterations", "num_full_iterations", "seed"):
        assert getattr(loaded, name) == getattr(quantizer, name)

    config = json.loads((tmp_path / "repo" / "quantizer_config.json").read_text())
    (tmp_path / "repo" / "quantizer_config.json").write_text(json.dumps({**config, "num_levels": 2}))
    with pytest.raises(ValueError, match=r"shape \(3, 16, 8\).*says \(2, 16, 8\)"):
        ResidualKMeans.from_pretrained(tmp_path / "repo")
    with pytest.raises(FileNotFoundError, match=r"No quantizer_config\.json in .*nowhere"):
        ResidualKMeans.from_pretrained(tmp_path / "nowhere")


def test_errors_name_the_cause_and_the_remedy(items, quantizer):
    with pytest.raises(ValueError, match=r"15 items cannot fill 16 codes.*at most 15"):
        ResidualKMeans(3, 16).fit(items[:15])
    broken = items.clone()
    broken[3, 0], broken[5, 1], broken[5, 2] = float("nan"), float("inf"), float("nan")
    for method in (ResidualKMeans(3, 16).fit, quantizer.encode):
        with pytest.raises(ValueError, match=r"2 of 603 rows .* NaN or infinity: drop these items"):
            method(broken)
    with pytest.raises(ValueError, match=r"width 7, but the codebooks were trained on width 8"):
        quantizer.encode(items[:, :7])
    with pytest.raises(ValueError, match=r"shape \(603,\) and type torch\.float32"):
        quantizer.encode(items[:, 0])
    with pytest.raises(ValueError, match=r"type torch\.int64"):
        ResidualKMeans(3, 16).fit(items.long())
    for use in (lambda q: q.encode(items), lambda q: q.decode(items.long()), lambda q: q.save_pretrained("nowhere")):
        with pytest.raises(RuntimeError, match="call `fit`"):
            use(ResidualKMeans())
    with pytest.raises(ValueError, match="`codebook_size` is 1; it must be at least 2"):
        ResidualKMeans(codebook_size=1)


def test_next_free_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    quantizer = ResidualKMeans(num_levels=2, codebook_size=12)
    quantizer.codebooks = torch.randn(2, 12, 3, generator=generator)
    codes = torch.stack([torch.arange(80) % 8, torch.randint(0, 4, (80,), generator=generator)], dim=1)
    items = quantizer.decode(codes) + 0.3 * torch.randn(80, 3, generator=generator)
    resolved = resolve_collisions(codes, quantizer, items, policy="next_free")

    residuals, last = items - quantizer.codebooks[0][codes[:, 0]], quantizer.codebooks[1]
    distances = ((residuals[:, None] - last) ** 2).sum(dim=2)
    own = distances.gather(1, codes[:, 1:])[:, 0]
    expected = codes.clone()
    for prefix in range(8):
        ascending = [item for item in own.argsort().tolist() if codes[item, 0] == prefix]
        free, movers = set(range(12)), []
        for item in ascending:
            movers += [] if int(codes[item, 1]) in free else [item]
            free.discard(int(codes[item, 1]))
        for item in movers:
            expected[item, 1] = min(free, key=lambda code: distances[item, code].item())
            free.discard(int(expected[item, 1]))
    assert torch.equal(resolved, expected)
    assert len(torch.unique(resolved, dim=0)) == 80


def test_items_far_from_the_origin():
    """Float32 keeps 7 digits: without centring, squared distances of 100 beside squared norms of 10^9 would be
    noise.
    """
    items = clustered_items(400, 8, 20)
    near, far = (ResidualKMeans(2, 16, num_iterations=5).fit(x) for x in (items, items + 10_000))
    errors = [(x - q.decode(q.encode(x))).square().mean().item() for x, q in ((items, near), (items + 10_000, far))]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("balanced", [True, False])
def test_files_are_fitted_as_the_same_items_in_memory(balanced, tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans, "_FEW_DISTANCES", 0)  # as if there were many
    items = clustered_items(3000, 6, 40)
    for number, (start, stop) in enumerate([(0, 1000), (1000, 1001), (1001, 3000)]):
        np.save(tmp_path / f"{number}.npy", items[start:stop].numpy())
    files = EmbeddingFiles(sorted(tmp_path.glob("*.npy")))
    assert files.shape == (3000, 6)
    picked = torch.tensor([2999, 1000, 0, -1, 1000, 1001])
    assert torch.equal(files[picked], items[picked]) and torch.equal(files[998:1003], items[998:1003])
    streamed, whole = (
        ResidualKMeans(2, 16, balanced=balanced, num_iterations=5, num_full_iterations=1).fit(each)
        for each in (files, items)
    )
    if balanced:
        assert all((torch.bincount(codes) - 187.5).abs().max() == 0.5 for codes in streamed.train_codes.T)
    found, expected = (quality_report(q.train_codes, x, q) for q, x in ((streamed, files), (whole, items)))
    assert found["reconstruction_mse"] == pytest.approx(expected["reconstruction_mse"], rel=0.01)
    assert_close(whole.decode(whole.encode(files)), whole.decode(whole.encode(items)))
    resolved = resolve_collisions(streamed.train_codes, streamed, files, policy="extra_level")
    assert len(torch.unique(resolved, dim=0)) == 3000


def test_files_that_do_not_belong_together_are_refused(items, tmp_path):
    np.save(tmp_path / "a.npy", items.numpy())
    np.save(tmp_path / "b.npy", items[:, :7].numpy())
    np.save(tmp_path / "c.npy", items.long().numpy())
    for names, message in (("ab", r"widths \[7, 8\]"), ("ac", r"c.npy holds int64"), ("", "no paths")):
        with pytest.raises(ValueError, match=message):
            EmbeddingFiles([tmp_path / f"{name}.npy" for name in names])
    with pytest.raises(ValueError, match="balanced='greedy' needs all items in memory"):
        ResidualKMeans(2, 8, balanced="greedy").fit(EmbeddingFiles([tmp_path / "a.npy"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_fits_and_encodes(items):
    quantizer = ResidualKMeans(num_levels=3, codebook_size=32).fit(items.cuda())
    assert quantizer.train_codes.is_cuda and quantizer.codebooks.is_cuda
    assert [len(torch.bincount(column).unique()) for column in quantizer.train_codes.T] == [2, 2, 2]
    codes = quantizer.encode(items)
    assert not codes.is_cuda and (codes == quantizer.encode(items.cuda()).cpu()).float().mean() > 0.99
    resolved = resolve_collisions(quantizer.train_codes, quantizer, items.cuda(), policy="next_free")
    assert len(torch.unique(resolved, dim=0)) == len(items)


@pytest.mark.parametrize("balanced", [True, False])  # plain k-means draws in every level
@pytest.mark.parametrize("in_files", [False, True])
def test_a_fit_that_was_stopped_goes_on(balanced, in_files, tmp_path, monkeypatch):
    """In the third level; half a level beside the two that are whole is not read."""
    items = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    if in_files:
        np.save(tmp_path / "items.npy", items)
        items = EmbeddingFiles([tmp_path / "items.npy"])
    whole = ResidualKMeans(3, 8, balanced).fit(items)
    train, trained = residual.train_codebook, []

    def training(*args, **kwargs):
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(residual, "train_codebook", training)
    with pytest.raises(KeyboardInterrupt):
        ResidualKMeans(3, 8, balanced).fit(items, tmp_path / "levels")
    (tmp_path / "levels" / "level-2.safetensors.partial").write_bytes(b"half")
    trained.clear()
    found = ResidualKMeans(3, 8, balanced).fit(items, tmp_path / "levels")
    assert len(trained) == 1
    assert found.codebooks.equal(whole.codebooks) and found.train_codes.equal(whole.train_codes)


def test_scattered_rows_of_files_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """In any order, the same row twice, from the end, over two files."""
    monkeypatch.setattr("onerec_hf.semantic_ids.embedding_files.ROWS", 3)
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "0.npy", rows[:20])
    np.save(tmp_path / "1.npy", rows[20:])
    files = EmbeddingFiles(sorted(tmp_path.glob("*.npy")))
    index = torch.tensor([49, 3, 3, 20, -1, 19, 0, 31, 7, 7, 12, 44, -50])
    assert torch.equal(files[index], torch.from_numpy(rows)[index])
    assert torch.equal(files[10:40:3], torch.from_numpy(rows[10:40:3])) and files[index[:0]].shape == (0, 4)
