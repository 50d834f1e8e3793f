"""k-means: centres that stand for many feature vectors, fitted to a random sample of them.

    features, piece after piece --reservoir--> (N, C) --k-means++ seeds--> --Lloyd's steps or mini-batches--> centres (K, C)

Each step gives every row to its nearest centre and moves each centre to the mean of its rows.
Sources: seeds, Arthur & Vassilvitskii 2007; mini-batches, Sculley 2010; the reservoir, Vitter 1985, algorithm R.
"""
import hashlib
import math

import torch


def reservoir(sample, new, seen, size, generator):
    """A uniform random sample of `size` rows of all that came: `sample` is one of the first `seen`, `new` is what comes now."""
    room = max(0, size - seen)
    sample = new[:room].clone() if sample is None else torch.cat([sample, new[:room]])
    late = new[room:]
    ends = torch.arange(seen + min(room, len(new)), seen + len(new)) + 1  # rows that have come, each included
    places = (torch.rand(len(late), generator=generator, dtype=torch.float64) * ends).long()
    kept = places < size
    for place, row in zip(places[kept].tolist(), late[kept]):  # one after the other: a later row may replace an earlier
        sample[place] = row
    return sample


def fit_kmeans(features, k, generator, iterations=25, batch=None):
    """k-means with k-means++ seeding: Lloyd's steps over all features, or over random batches of them.

    Args: features (N, C) float32; generator: torch.Generator; iterations: passes over as many rows as there are; batch: rows a
        step, a centre then moving to the mean of all rows that it was ever given.
    Returns: centres (k, C) float32, mean squared distance to the nearest centre (float).
    """
    if len(features) < k:
        raise ValueError(f"{len(features)} frames cannot be divided into {k} clusters; give more audio")
    centers = seed_centers(features, k, generator)
    given = torch.zeros(k)  # rows that each centre has been given; Lloyd's steps forget them
    epoch = max(1, len(features) // batch) if batch else 1  # steps that take as many rows as there are
    for step in range(iterations * epoch):
        rows = features[torch.randint(len(features), (batch,), generator=generator)] if batch else features
        labels = nearest_centers(rows, centers)[1]
        counts = torch.bincount(labels, minlength=k).float()
        sums = torch.zeros_like(centers).index_add_(0, labels, rows)
        given = given + counts if batch else counts
        centers = centers + (sums - counts[:, None] * centers) / given.clamp(min=1)[:, None]
        if (step + 1) % epoch == 0:
            for dead in (given == 0).nonzero().flatten().tolist():  # re-seed on a random frame
                centers[dead] = features[int(torch.randint(len(features), (1,), generator=generator))]
            given = given * 0.5  # old rows were given to centres that stood elsewhere
    return centers, nearest_centers(features, centers)[0].mean().item()


def seed_centers(features, k, generator):
    """k-means++: each new seed is drawn with probability proportional to its squared distance from the others."""
    energy = features.square().sum(1)
    pick = int(torch.randint(len(features), (1,), generator=generator))
    centers, distance = features[pick][None], torch.full((len(features),), math.inf)
    for _ in range(1, k):
        last = centers[-1]
        distance = torch.minimum(distance, (energy - 2 * features @ last + last.square().sum()).clamp(min=0))
        total = distance.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        pick = int(torch.searchsorted(total, draw).clamp(max=len(features) - 1))
        centers = torch.cat([centers, features[pick][None]])
    return centers


def nearest_centers(features, centers):
    """Squared distance of each row to its nearest centre, and which it is, 10,000 rows at a time."""
    parts = [(centers.square().sum(1) - 2 * rows @ centers.T).min(1) for rows in features.split(10_000)]
    distance = torch.cat([part.values for part in parts]) + features.square().sum(1)
    return distance.clamp(min=0), torch.cat([part.indices for part in parts])


def fingerprint(tensor):
    """First 16 hex digits of the SHA-256 of a float32 tensor's bytes: tells k-means tables apart."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()[:16]
