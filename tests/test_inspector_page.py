"""The inspector's page against sounds whose units are known: every unit is a tone of its own, so its spectrum has one peak."""
import os
import re
from collections import Counter
from html import escape, unescape
from urllib.parse import unquote

import numpy as np
import pytest
import torch

import hubert_units
from corpus.shards import UnitShards, write_shards
from pages import differences, inspector
from pages.clips import BANDS, mel
from speech.audio import SAMPLE_RATE, write_wav
from tests.conftest import RECIPE

K, RATE = 12, 25  # units, frames a second
EVIL = "<img src=x onerror=alert(1)>.wav"
NAMES = [EVIL, "b #1 50%.flac", "a.wav", "sub/d.wav", "e.wav"]
RECIPE_K = {**RECIPE, "num_units": K, "frame_rate": float(RATE)}


def frequency(unit):
    return 400 + 550 * unit  # Hz


def made_up(seed, frames):
    """Runs of units, of which the last never occurs: units (T,), runs (T,)."""
    rng = np.random.default_rng(seed)
    units = np.cumsum(rng.integers(1, K - 1, frames)) % (K - 1)  # neighbours differ
    runs = rng.integers(1, 7, frames)
    count = int(np.searchsorted(np.cumsum(runs), frames))
    return units[:count], runs[:count]


def sung(units, runs):
    """Samples: each frame the tone of its unit."""
    tones = frequency(np.repeat(units, runs * SAMPLE_RATE // RATE))
    return torch.from_numpy(0.3 * np.sin(2 * np.pi * np.cumsum(tones) / SAMPLE_RATE)).float()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """root/sounds/..., root/units, encoded in root; documents as written."""
    root = tmp_path_factory.mktemp("inspector")
    documents = []
    for seed, name in enumerate(NAMES):
        units, runs = made_up(seed, 60 + 10 * seed)
        (root / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(root / "sounds" / name, sung(units, runs))
        documents.append((f"sounds/{name}", units, runs, runs.sum() / RATE))
    write_shards(root / "units", RECIPE_K, documents, failures=[("broken.wav", "bad")])
    (root / "units/named_from.txt").write_text("..")
    return root, documents


@pytest.fixture(scope="module")
def page(world):
    return inspector.write(world[0] / "units").read_text()


def addresses(page):
    return [unescape(found) for found in re.findall(r'(?:src|href)="([^"]*)"', page)]


def cards_of(page):
    """{unit: its card} in the order of the page."""
    found = re.search(r'<ul class="units">(.*?)</ul>', page, re.DOTALL).group(1).split("<li>")[1:]
    return {int(re.search(r"<b>(\d+)</b>", card).group(1)): card for card in found}


# ---------------------------------------------------------------------------------------------- one folder

def test_numbers_and_shares_are_those_of_a_count(world, page):
    counts = Counter(unit for _, units, _, _ in world[1] for unit in units.tolist())
    total = sum(counts.values())
    assert f"<dd>{total:,} (" in page and "in 5 documents; 1 recordings failed" in page and "1 never used" in page
    shares = {unit: re.search(r"<small>([\d.]+) %", card).group(1) for unit, card in cards_of(page).items()}
    assert shares == {unit: f"{100 * count / total:.2f}" for unit, count in counts.items()} and len(shares) == K - 1
    assert [counts[unit] for unit in shares] == sorted(counts.values(), reverse=True)
    assert f"{K - 1} of the {K - 1} units that occur" in page
    bars = re.search(r"Frequencies by number.*?</figure>", page, re.DOTALL).group()
    assert {int(unit): float(share) for unit, share in re.findall(r"<title>(\d+): ([\d.]+)</title>", bars)} == pytest.approx(
        {unit: 100 * counts[unit] / total for unit in range(K)}, rel=1e-4)
    runs = Counter(run for _, _, runs, _ in world[1] for run in runs.tolist())
    bars = re.search(r"Run lengths.*?</figure>", page, re.DOTALL).group()
    drawn = dict(re.findall(r"<title>([^:<]+): ([\d.]+)</title>", bars))
    assert float(drawn["3"]) == pytest.approx(100 * runs[3] / total, rel=1e-4)
    assert float(drawn["5-8"]) == pytest.approx(100 * (runs[5] + runs[6]) / total, rel=1e-4)


def test_the_mean_spectrum_of_a_unit_has_the_peak_of_its_tone(world):
    root, documents = world
    found = inspector.documents(UnitShards(root / "units"), range(len(NAMES)))
    units = list(range(K))
    spectra, frames = inspector.mean_spectra(found, units, RATE)
    assert spectra.shape == (K, BANDS // inspector.AVERAGED, 2 * inspector.AROUND + 1)
    assert 0 <= spectra.min() <= spectra.max() <= 1
    assert frames.tolist() == [sum(int(runs[of == unit].sum()) for _, of, runs, _ in documents) for unit in units]
    assert frames[-1] == 0 and not spectra[-1].any()
    for unit in units[:-1]:
        alone = mel(sung(np.array([unit]), np.array([50])))[:, 40:60].mean(1)
        assert spectra[unit, :, inspector.AROUND].argmax() == alone.argmax() // inspector.AVERAGED


def test_players_play_the_unit_that_they_are_for(world, page):
    root, documents = world
    frames = {name: np.repeat(units, runs) for name, units, runs, _ in documents}
    played = 0
    for unit, card in cards_of(page).items():
        of = {name for name, units, _, _ in documents if unit in units}
        places = re.findall(r'preload="none" src="([^"]*)#t=([\d.]+),([\d.]+)" aria-label="unit (\d+), ([\d.]+) s', card)
        assert len(places) == min(inspector.PLACES, len(of))
        best = sorted((max(runs[units == unit]) for _, units, runs, _ in documents if unit in units), reverse=True)
        found = [round((float(end) - inspector.BEFORE - float(at)) * RATE) for _, _, end, _, at in places]
        assert found == best[:len(places)]
        for address, begin, end, named, at in places:
            name = unquote(unescape(address)).removeprefix("../")
            assert (root / "units" / unquote(unescape(address))).is_file() and int(named) == unit
            middle = slice(round(float(at) * RATE), round((float(end) - inspector.BEFORE) * RATE))
            assert set(frames[name][middle]) == {unit}
            assert float(begin) == pytest.approx(max(0, float(at) - inspector.BEFORE), abs=0.011)
            played += 1
    assert played > K


def test_strips_are_as_long_as_their_units(world, page):
    figures = re.findall(r'<figure class="clip">.*?</figure>', page, re.DOTALL)
    assert len(figures) == inspector.SHOWN
    boxes = re.findall(r'<rect x="([\d.]+)"[^>]*width="([\d.]+)"[^>]*><title>unit (\d+),', figures[0])
    _, units, runs, _ = world[1][0]
    assert [int(unit) for _, _, unit in boxes] == units.tolist()
    np.testing.assert_allclose([float(width) for _, width, _ in boxes], runs / RATE * 100, atol=0.051)
    np.testing.assert_allclose([float(x) for x, _, _ in boxes], (np.cumsum(runs) - runs) / RATE * 100, atol=0.051)
    assert all("data:image/png" in figure and "<audio" in figure for figure in figures)


@pytest.mark.parametrize("runs, seconds", [([5, 3, 2], [0.2, 0.2]), ([1], [0.04]), ([], []), ([1, 1, 498, 600], [0.08, 19.92])])
def test_a_strip_joins_equal_neighbours_and_ends_in_time(runs, seconds):
    units = np.array([7, 3, 3, 3])[:len(runs)] if len(runs) != 4 else np.array([7, 7, 3, 3])
    found, lasting = inspector.within(units, np.array(runs, int), RATE)
    assert found.tolist() == [7, 3][:len(found)] and lasting.tolist() == pytest.approx(seconds)


def test_names_do_no_harm_and_nothing_is_fetched(world, page):
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;.wav") > 2
    assert not re.findall(r"https?:|//[a-z]", re.sub(r"<script>.*?</script>|data:[^\"]*", "", page, flags=re.DOTALL))
    for address in addresses(page):
        assert address.startswith("data:") or (world[0] / "units" / unquote(address.partition("#")[0])).is_file(), address


def test_without_recordings_there_are_strips_alone_and_the_page_says_so(tmp_path, world):
    write_shards(tmp_path / "units", RECIPE_K, world[1])
    page = inspector.write(tmp_path / "units").read_text()
    first = escape(f"{os.getcwd()}/sounds/{EVIL}")
    assert f"None of 5 recordings, chosen evenly, is at hand (the first: {first})" in page and "<img src=x" not in page
    assert "<audio" not in page and "data:image" not in page and page.count('<figure class="strip">') == inspector.SHOWN
    assert len(cards_of(page)) == K - 1 and " s in a.wav</p>" in page


def test_thousands_of_units_stay_small_and_what_is_left_out_is_said(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(inspector, "CARDS", 150)
    documents = [(f"{i}.wav", rng.permutation(400), np.full(400, 2), 32) for i in range(3)]
    write_shards(tmp_path, {**RECIPE_K, "num_units": 400}, documents)
    page = inspector.write(tmp_path).read_text()
    assert "150 of the 400 units that occur" in page and len(cards_of(page)) == 150
    assert len(page) < 1000 * 150


# ---------------------------------------------------------------------------------------------- two folders

@pytest.mark.parametrize("kinds", [(5, 5), (3, 40), (1, 4), (1, 1)])
def test_agreement_is_scikit_learns(kinds):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    first = rng.integers(kinds[0], size=400)
    second = np.where(rng.random(400) < 0.5, first * 7 % kinds[1], rng.integers(kinds[1], size=400))
    found = differences.agreement(first, second, same=True)
    assert found["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(first, second), abs=1e-9)
    assert found["information"] == pytest.approx(metrics.mutual_info_score(first, second) / np.log(2), abs=1e-9)
    assert found["equal"] == found["agreeing"] == pytest.approx((first == second).mean())
    counts = Counter((a, b) for a, b in zip(first.tolist(), second.tolist()) if a != b)
    assert [n for _, _, n, _ in found["confused"]] == sorted(counts.values(), reverse=True)[:differences.CONFUSED]
    assert all(counts[a, b] == n and share == pytest.approx(n / (first == a).sum()) for a, b, n, share in found["confused"])


def test_other_names_and_finer_units_agree_where_they_mean_the_same():
    rng = np.random.default_rng(1)
    first = rng.integers(6, size=500)
    finer = (5 - first) * 3 + rng.integers(3, size=500)  # each unit is three of the second folder
    second = finer.copy()
    second[:20] = (finer[:20] + 3) % 18  # slips
    found = differences.agreement(first, second, same=False)
    assert found["agreeing"] == pytest.approx(0.96) and differences.agreement(first, finer, same=False)["agreeing"] == 1
    np.testing.assert_array_equal(found["agree"](first, second), finer == second)
    assert differences.agreement(first, 5 - first, same=False)["nmi"] == pytest.approx(1)
    assert differences.agreement(first, 5 - first, same=True)["equal"] == (first == 5 - first).mean() < 1


def test_frames_of_two_rates_meet_at_equal_times():
    slow, fast = np.arange(10), np.arange(21) + 100
    a, b = differences.at_equal_times([slow, fast], [25.0, 50.0])
    assert a.tolist() == np.repeat(slow, 2).tolist() and b.tolist() == fast[:20].tolist()
    b, a = differences.at_equal_times([fast[:15], slow], [50.0, 25.0])
    assert a.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7] and b.tolist() == fast[:15].tolist()
    a, b = differences.at_equal_times([slow, fast], [25.0, 25.0])
    assert a.tolist() == slow.tolist() and b.tolist() == fast[:10].tolist()


def test_two_folders_are_compared_by_recording_and_marked_where_they_differ(tmp_path, world):
    root, documents = world
    changed, frames = [], []
    for name, units, runs, seconds in documents[1:][::-1]:  # another order, and one recording less
        of = np.repeat(units, runs)
        of[10:14] = (of[10:14] + 1) % (K - 1)
        frames += [(a, b) for a, b in zip(np.repeat(units, runs).tolist(), of.tolist())]
        changed.append((f"../{root.name}/{name}", of, np.ones_like(of), seconds))
    write_shards(root / "other", {**RECIPE_K, "dedup": False}, changed)
    (root / "other/named_from.txt").write_text("..")
    page = inspector.write(root / "units", tmp_path / "both.html", root / "other").read_text()
    equal = sum(a == b for a, b in frames) / len(frames)
    assert f"<dd>4 recordings, {len(frames)} frames, at equal times</dd>" in page
    assert f"<dt>equal units</dt><dd>{100 * equal:.2f} % of the frames</dd>" in page and 0.9 < equal < 1
    marks = re.findall(r'<path class="differs" d="([^"]*)"/>', page)
    assert len(marks) == 4 and set(marks) == {"M40.0 126H56.0"}  # frames 10 to 13, at 100 pixels a second
    assert all((tmp_path / unquote(one.partition("#")[0])).is_file() for one in addresses(page) if not one.startswith("data:"))


# ---------------------------------------------------------------------------------------------- the command

def test_the_command_writes_the_page_and_the_folder_stays_one_of_shards(tmp_path, world, capsys):
    write_shards(tmp_path / "units", RECIPE_K, world[1])
    before = {path.name: path.read_bytes() for path in (tmp_path / "units").iterdir()}
    hubert_units.main([f"--inspect={tmp_path / 'units'}", "--page"])
    assert capsys.readouterr().out.endswith(f"\nwrote {tmp_path}/units/index.html\n")
    hubert_units.main([f"--inspect={tmp_path / 'units'}", f"--page={tmp_path}/new/page.html", f"--beside={tmp_path / 'units'}"])
    assert "<dd>100.00 % of the frames</dd>" in (tmp_path / "new/page.html").read_text()
    assert {name: (tmp_path / "units" / name).read_bytes() for name in before} == before
    old = (tmp_path / "units/index.html").read_bytes()
    write_shards(tmp_path / "units", RECIPE_K, [("more.wav", *made_up(9, 40), 1.6)])
    assert len(UnitShards(tmp_path / "units")) == 6
    hubert_units.main([f"--inspect={tmp_path / 'units'}", "--page"])
    assert (tmp_path / "units/index-1.html").read_bytes() == old != (tmp_path / "units/index.html").read_bytes()


@pytest.mark.parametrize("said, recipe, runs, page", [
    ("bytes.* without a frame rate.*--inspect without --page", {"kind": "bytes", "num_units": 256}, [1, 1], "index.html"),
    ("without run lengths", RECIPE_K, [1, 1], "index.html"),
    ("expected the name of a page, such as index.html", RECIPE_K, [1, 2], "inline"),
    ("no recording in common", RECIPE_K, [1, 2], "x.html")])
def test_what_cannot_be_shown_is_said(tmp_path, world, said, recipe, runs, page):
    write_shards(tmp_path, recipe, [("a.wav", np.array([1, 2]), np.array(runs), 1.0)])
    with pytest.raises(ValueError, match=said):
        inspector.write(tmp_path, page, world[0] / "units" if page == "x.html" else None)
    assert not [*tmp_path.glob("*.html")]


def test_a_folder_without_its_runs_or_shards_is_named(tmp_path, world):
    write_shards(tmp_path / "units", RECIPE_K, world[1])
    (tmp_path / "units/00000.runs.bin").unlink()
    for folder, said in ((tmp_path / "units", "runs.bin is not there"), (tmp_path, "holds no unit shards")):
        with pytest.raises(FileNotFoundError, match=said):
            inspector.write(folder)
