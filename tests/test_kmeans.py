"""kmeans.py: as good as scikit-learn, reproducible, and a sample of a stream is a fair one."""
import pytest
import torch

from speech.kmeans import fit_kmeans, nearest_centers, reservoir


def clusters(count, per_cluster, width, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = spread * torch.randn(count, width, generator=generator)
    return (centers[:, None] + torch.randn(count, per_cluster, width, generator=generator)).flatten(0, 1), centers


def inertia_of(points, centers):
    return torch.cdist(points.double(), centers.double()).square().min(1).values.mean().item()


@pytest.mark.parametrize("k", [5, 20, 40])
def test_kmeans_is_as_good_as_scikit_learn(k):
    cluster = pytest.importorskip("sklearn.cluster")
    points, _ = clusters(20, 60, 6, 1.5)
    expected = cluster.KMeans(k, n_init=5, random_state=0).fit(points.numpy()).inertia_ / len(points)
    centers, reported = fit_kmeans(points, k, torch.Generator().manual_seed(0), iterations=40)
    assert centers.shape == (k, 6) and centers.dtype == torch.float32
    assert inertia_of(points, centers) == pytest.approx(reported, rel=1e-3)  # converged: the last step changes little
    assert inertia_of(points, centers) < 1.04 * expected
    shuffled = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))]
    assert inertia_of(points, shuffled[:k]) > 1.3 * expected  # what no fitting at all would give


def test_kmeans_finds_clusters_that_lie_apart():
    points, truth = clusters(8, 40, 5, 20.0)
    centers, inertia = fit_kmeans(points, 8, torch.Generator().manual_seed(0))
    assert torch.cdist(truth, centers).min(1).values.max() < 1.0 and inertia < 6.0  # 5 dimensions of variance 1


def test_kmeans_is_reproducible_and_survives_fewer_distinct_points_than_centres():
    points, _ = clusters(8, 40, 5, 2.0)
    first, second, other = (fit_kmeans(points, 8, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    centers, inertia = fit_kmeans(torch.eye(3).repeat(4, 1), 5, torch.Generator().manual_seed(0))
    assert torch.isfinite(centers).all() and inertia == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="12 frames cannot be divided into 13"):
        fit_kmeans(torch.eye(3).repeat(4, 1), 13, torch.Generator())


@pytest.mark.parametrize("k", [20, 50])
def test_mini_batches_are_nearly_as_good_as_scikit_learns(k):
    cluster = pytest.importorskip("sklearn.cluster")
    points, _ = clusters(30, 100, 8, 1.5)
    full = cluster.KMeans(k, n_init=3, random_state=0).fit(points.numpy()).inertia_ / len(points)
    theirs = cluster.MiniBatchKMeans(k, n_init=3, batch_size=256, random_state=0).fit(points.numpy()).inertia_ / len(points)
    centers, inertia = fit_kmeans(points, k, torch.Generator().manual_seed(0), batch=256)
    assert inertia_of(points, centers) == pytest.approx(inertia, rel=1e-4)
    assert inertia < 1.05 * full and inertia < 1.03 * theirs


def test_dead_centres_are_seeded_again(monkeypatch):
    points, truth = clusters(6, 50, 4, 30.0)
    far = torch.cat([truth[:1]] + [torch.full((1, 4), 1e4 + i) for i in range(5)])  # five seeds that no point is near
    monkeypatch.setattr("speech.kmeans.seed_centers", lambda *_: far.clone())
    for batch in (None, 64):
        centers, inertia = fit_kmeans(points, 6, torch.Generator().manual_seed(3), batch=batch)
        assert (centers < 1e3).all() and inertia < 400, inertia  # all six stand among the points


def test_nearest_centers_are_those_of_float64():
    points, centers = clusters(5, 30, 4, 1.0)
    distance, labels = nearest_centers(points, centers)
    exact = torch.cdist(points.double(), centers.double()).square()
    assert torch.equal(labels, exact.argmin(1))
    torch.testing.assert_close(distance.double(), exact.min(1).values, rtol=1e-4, atol=1e-4)


def test_the_reservoir_is_a_uniform_sample_of_all_that_came():
    counts = torch.zeros(40)
    for seed in range(3000):
        generator, sample, seen = torch.Generator().manual_seed(seed), None, 0
        for piece in torch.arange(40.0)[:, None].split([3, 7, 1, 20, 9]):
            sample = reservoir(sample, piece, seen, 10, generator)
            seen += len(piece)
        assert len(sample) == 10 and len(sample.unique()) == 10
        counts[sample[:, 0].long()] += 1
    expected = 3000 * 10 / 40  # each row is in a quarter of the samples; 5 standard deviations of a binomial
    assert (counts - expected).abs().max() < 5 * (3000 * 0.25 * 0.75) ** 0.5
    few = reservoir(None, torch.ones(4, 2), 0, 10, torch.Generator())
    assert len(reservoir(few, torch.zeros(3, 2), 4, 10, torch.Generator())) == 7
