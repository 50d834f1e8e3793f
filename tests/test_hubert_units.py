"""hubert_units.py: features equal those of transformers, units are the nearest centres, bad files spoil nothing."""
import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import data
import hubert_units
import pretrained
from audio import SAMPLE_RATE, read_wav
from hubert_units import Hubert, HubertConfig, deduplicate, fit_kmeans, load_hubert, load_unit_encoder

ROOT = Path(hubert_units.__file__).parent
C, K, LAYERS = 16, 12, 3
BASE = HubertConfig(conv_dim=(8,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2), n_embd=C,
                    n_layer=LAYERS, n_head=4, n_inner=24, pos_kernel=16, pos_groups=4)
SLOW = dataclasses.replace(BASE, conv_dim=(8,) * 8, conv_kernel=(*BASE.conv_kernel, 2), conv_stride=(*BASE.conv_stride, 2),
                           pos_batch_norm=True)
KINDS = {"50hz": (BASE, 400, 320), "25hz": (SLOW, 720, 640)}  # config, samples that one frame sees, samples per frame
each_kind = pytest.mark.parametrize("kind", KINDS)


def noise(length, seed=0):
    return 0.3 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def perturb(tensors):
    """Every tensor away from its initial value, variances positive."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        random = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + random.abs())
        elif "weight_g" in name or "original0" in name:
            tensor.copy_(1 + 0.3 * random.abs())
        else:
            tensor.copy_(float(tensor.ndim == 1 and name.endswith("weight")) + 0.3 * random)


def write_folder(folder, config=BASE, layer=2, centers=None, metadata=None):
    """A tiny HuBERT of random weights with k-means centres, as the command takes it."""
    hubert = Hubert(config)
    perturb(hubert.state_dict())
    settings, tensors = pretrained.write_hubert(dataclasses.asdict(config), hubert.state_dict())
    checkpoint.write_model(folder, settings, tensors)
    if centers is None:
        features = hubert.eval()(noise(40_000)[None], layer)[0].detach()
        centers = features[:: len(features) // K][:K].clone()  # real frames, so that all units occur
    metadata = {"layer": str(layer)} if metadata is None else metadata
    checkpoint.write_tensors(folder / "kmeans.safetensors", {"centers": centers}, metadata)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hubert")
    return {kind: write_folder(root / kind, KINDS[kind][0]) for kind in KINDS}


# ---------------------------------------------------------------------------------------------- features

def their_model(config):
    transformers = pytest.importorskip("transformers")
    settings, _ = pretrained.write_hubert(dataclasses.asdict(config), Hubert(config).state_dict())
    for key in ("architectures", "model_type"):
        settings.pop(key)
    model = transformers.HubertModel(transformers.HubertConfig(**settings)).eval()
    perturb(model.state_dict())
    return model


def old_weight_norm_names(tensors):
    new = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert new + "0" in tensors and new + "1" in tensors
    new = "parametrizations.weight.original"
    return {name.replace(f"{new}0", "weight_g").replace(f"{new}1", "weight_v"): tensor for name, tensor in tensors.items()}


def wrapped(tensors):
    return {f"hubert.{name}": tensor for name, tensor in tensors.items()}


def without_spare_tensors(tensors):
    spare = ("masked_spec_embed", "encoder.pos_conv_embed.batch_norm.num_batches_tracked")
    assert any(name in tensors for name in spare)
    return {name: tensor for name, tensor in tensors.items() if name not in spare}


@pytest.mark.parametrize("kind, change", [
    ("50hz", None), ("50hz", old_weight_norm_names), ("50hz", wrapped), ("50hz", without_spare_tensors),
    ("25hz", None), ("25hz", wrapped), ("25hz", without_spare_tensors)])
def test_features_of_every_layer_equal_those_of_transformers(kind, change, tmp_path):
    theirs = their_model(KINDS[kind][0])
    theirs.save_pretrained(tmp_path)
    if change:
        save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    hubert, wav = load_hubert(tmp_path), noise(9000)
    with torch.no_grad():
        states = theirs(wav[None], output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
        for layer, expected in enumerate(states):
            assert expected.std() > 0.3
            torch.testing.assert_close(hubert(wav[None], layer), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hubert(wav[None]), states[-1], rtol=1e-4, atol=1e-5)
        assert (states[1] - states[2]).abs().max() > 0.1  # layers can be told apart
        for layer in range(1, LAYERS + 1):
            encoder = hubert_units.UnitEncoder(hubert, torch.zeros(K, C), layer)
            torch.testing.assert_close(encoder.features(wav), states[layer][0], rtol=1e-4, atol=1e-5)


@each_kind
def test_what_is_written_is_what_transformers_opens(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path, KINDS[kind][0])
    hubert, wav = load_hubert(tmp_path), noise(9000)
    theirs, loading = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    if kind == "25hz":  # at 50 Hz transformers wants length and direction of the positional weights apart
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            torch.testing.assert_close(hubert(wav[None]), theirs.eval()(wav[None]).last_hidden_state, rtol=1e-4, atol=1e-5)
    options, tensors = pretrained.read_hubert(tmp_path)
    assert HubertConfig(**options) == KINDS[kind][0]
    written = pretrained.write_hubert(options, tensors)[1]
    for name, tensor in checkpoint.read_tensors(tmp_path).items():
        assert torch.equal(written[name], tensor), name


@each_kind
def test_the_number_of_frames_is_the_published_formula(kind, folders):
    _, shortest, hop = KINDS[kind]
    encoder = load_unit_encoder(folders[kind])
    assert (encoder.hubert.receptive_field, encoder.hubert.hop, encoder.frame_rate) == (shortest, hop, SAMPLE_RATE / hop)
    for length in range(shortest, 40_000, 7):
        assert encoder.hubert.num_frames(length) == (length - shortest) // hop + 1
    assert encoder.hubert.num_frames(shortest - 1) == 0
    for length in (shortest, shortest + 1, shortest + hop - 1, shortest + hop, 4001, 5119, 5120, 5121, 8000, 16_000):
        expected = (length - shortest) // hop + 1
        assert encoder.features(noise(length)).shape == (expected, C) and encoder.encode(noise(length)).shape == (expected,)


@each_kind
def test_what_is_no_recording_of_one_frame_is_refused(kind, folders):
    shortest, encoder = KINDS[kind][1], load_unit_encoder(folders[kind])
    for length in (0, 1, shortest - 1):
        with pytest.raises(ValueError, match=f"{length} samples are shorter than one frame \\({shortest} samples"):
            encoder.encode(noise(length))
    with pytest.raises(ValueError, match=r"shape \(S,\), got \(1, 8000\)"):
        encoder.features(noise(8000)[None])


def test_long_recordings_are_encoded_in_independent_pieces(folders, monkeypatch):
    monkeypatch.setattr(hubert_units, "CHUNK_SECONDS", 1)
    encoder, wav = load_unit_encoder(folders["25hz"]), noise(2 * SAMPLE_RATE + 719)
    pieces = [encoder.features(piece) for piece in wav.split(SAMPLE_RATE)[:2]]  # the rest is shorter than a frame
    assert torch.equal(encoder.features(wav), torch.cat(pieces))
    assert len(encoder.features(noise(2 * SAMPLE_RATE + 720))) == len(torch.cat(pieces)) + 1


# ---------------------------------------------------------------------------------------------- units

def test_deduplication_equals_itertools_groupby():
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 50, 400):
        frames = rng.integers(0, 4, size=length)
        groups = [(int(unit), len(list(group))) for unit, group in itertools.groupby(frames.tolist())]
        for sequence in (frames, frames.tolist(), torch.from_numpy(frames)):
            units, runs = deduplicate(sequence)
            assert units.dtype == runs.dtype == torch.int64
            assert list(zip(units.tolist(), runs.tolist())) == groups
        assert torch.equal(torch.repeat_interleave(units, runs), torch.from_numpy(frames))
    assert [part.tolist() for part in deduplicate(torch.tensor([5, 5, 5, 2, 2, 5]))] == [[5, 2, 5], [3, 2, 1]]


def test_units_are_the_nearest_centres_by_brute_force_in_float64(folders):
    encoder = load_unit_encoder(folders["50hz"])
    features = encoder.features(noise(60_000, seed=1))
    distance = (features.double()[:, None] - encoder.centers.double()[None]).square().sum(2)  # (F, K)
    expected = distance.argmin(1)
    assert torch.equal(encoder.encode(noise(60_000, seed=1)), expected)
    assert len(expected.unique()) >= K // 2  # many units occur
    centers = torch.randn(200, C, generator=torch.Generator().manual_seed(2))
    points = torch.randn(3000, C, generator=torch.Generator().manual_seed(3))
    many = hubert_units.UnitEncoder(encoder.hubert, centers, 1)
    assert torch.equal(many.quantize(points), torch.cdist(points.double(), centers.double()).argmin(1))


def test_ties_go_to_the_lowest_index(folders):
    hubert = load_unit_encoder(folders["50hz"]).hubert
    centers = torch.zeros(4, C)
    centers[1, 0] = centers[2, 0] = 2.0
    encoder = hubert_units.UnitEncoder(hubert, centers, 1)
    points = torch.zeros(3, C)
    points[:, 0] = torch.tensor([-1.0, 1.0, 5.0])  # nearest: 0 and 3; all four; 1 and 2
    assert encoder.quantize(points).tolist() == [0, 0, 1]


@each_kind
def test_a_batch_gives_the_units_of_each_recording_alone(kind, folders):
    encoder = load_unit_encoder(folders[kind])
    wavs = [noise(length, seed) for seed, length in enumerate((16_000, 3000, 9999, 16_000))]
    together = encoder.encode_batch(wavs)
    assert len(together) == 4
    for units, wav in zip(together, wavs):
        assert torch.equal(units, encoder.encode(wav))
        assert units.tolist() == encoder.encode(wav.numpy()).tolist()


# ---------------------------------------------------------------------------------------------- k-means

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


# ---------------------------------------------------------------------------------------------- loading

def test_the_layer_and_the_recipe_come_from_the_files(folders, tmp_path):
    encoder = load_unit_encoder(folders["25hz"])
    assert (encoder.layer, encoder.num_units, encoder.frame_rate) == (2, K, 25.0)
    assert encoder.recipe == {"kind": "hubert", "model": "25hz", "layer": 2, "num_units": K, "frame_rate": 25.0,
                              "centers": data.fingerprint(encoder.centers)}
    save_file({"centers": torch.ones(4, C)}, tmp_path / "other.safetensors")
    other = load_unit_encoder(str(folders["25hz"]), kmeans=str(tmp_path / "other.safetensors"), layer=1)
    assert (other.layer, other.num_units) == (1, 4) and other.recipe["centers"] != encoder.recipe["centers"]


def test_mistakes_in_the_k_means_file_are_named(folders, tmp_path):
    folder = folders["50hz"]

    def load(tensors=None, name="kmeans.safetensors", metadata=None, **options):
        if tensors:
            save_file(tensors, tmp_path / name, metadata=metadata)
        return load_unit_encoder(folder, kmeans=tmp_path / name, **options)

    with pytest.raises(FileNotFoundError, match="no k-means centres at .*--kmeans"):
        load(name="nothing.safetensors")
    with pytest.raises(ValueError, match=r"\(12, 15\) do not fit features of width 16"):
        load({"centers": torch.zeros(K, 15)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="do not fit"):
        load({"centers": torch.zeros(C)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="no tensor `centers`.*means"):
        load({"means": torch.zeros(K, C)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="which layer.*--layer"):
        load({"centers": torch.zeros(K, C)})
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match=f"layer {layer}: this HuBERT has layers 1 to 3"):
            load(layer=layer)
        with pytest.raises(ValueError, match=f"layer {layer}: this HuBERT has layers 1 to 3"):
            load({"centers": torch.zeros(K, C)}, metadata={"layer": str(layer)})
    with pytest.raises(ValueError, match="kmeans.txt"):
        (tmp_path / "kmeans.txt").write_text("1 2 3")
        load(name="kmeans.txt")
    with pytest.raises(ValueError, match="damaged"):
        (tmp_path / "short.safetensors").write_bytes((folder / "kmeans.safetensors").read_bytes()[:-3])
        load(name="short.safetensors")


def test_a_folder_that_holds_no_hubert_is_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="--tokenizer="):
        load_unit_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load_unit_encoder(folders["50hz"] / "model.safetensors")
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_unit_encoder(tmp_path / "a")
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "kmeans.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no k-means centres"):
        load_unit_encoder(tmp_path / "b")
    write_folder(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_unit_encoder(tmp_path / "c")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "wav2vec2"}, "'wav2vec2', expected 'hubert'"), ({"do_stable_layer_norm": True}, "do_stable_layer_norm"),
    ({"feat_extract_norm": "layer"}, "feat_extract_norm"), ({"conv_bias": True}, "conv_bias"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"conv_dim": None}, "conv_dim"), ({"num_hidden_layers": None}, "num_hidden_layers"), ({"num_hidden_layers": 4}, "missing"),
    ({"num_hidden_layers": 2}, "unexpected"), ({"conv_pos_batch_norm": True}, "missing"), ({"intermediate_size": 25}, "shape")])
def test_a_config_that_the_code_would_misread_is_refused(change, words, tmp_path):
    write_folder(tmp_path)
    settings = {**checkpoint.read_json(tmp_path / "config.json"), **change}
    checkpoint.write_json(tmp_path / "config.json", {key: value for key, value in settings.items() if value is not None})
    with pytest.raises(ValueError, match=words):
        load_unit_encoder(tmp_path)


@pytest.mark.parametrize("part", ["weight_g", "weight_v"])
def test_half_a_weight_norm_is_an_error_that_names_the_convolution(part, tmp_path):
    write_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop("encoder.pos_conv_embed.conv.weight")
    save_file({**tensors, f"encoder.pos_conv_embed.conv.{part}": weight}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pos_conv_embed.conv"):
        load_hubert(tmp_path)


# ---------------------------------------------------------------------------------------------- the command

def write_recordings(folder):
    """Good and bad files; returns their paths."""
    (folder / "sub" / "deep").mkdir(parents=True)
    good = {"a.wav": 16_000, "sub/b.flac": 8000, "sub/deep/c.wav": 44_100, "D.WAV": 22_050, "e.ogg": 16_000}
    for i, (name, rate) in enumerate(good.items()):
        samples = noise(rate // 2, seed=i).clamp(-1, 1).numpy()
        soundfile.write(folder / name, np.stack([samples, 0.5 * samples], axis=1) if name == "a.wav" else samples, rate)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio")
    soundfile.write(folder / "silent.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "short.wav", np.zeros(100), 16_000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    (folder / "readme.txt").write_text("not taken for a recording")
    return sorted(str(folder / name) for name in good)


BAD = {"empty.wav": "as audio", "text.wav": "as audio", "silent.wav": "no samples", "short.wav": "shorter than one frame",
       "nan.wav": "NaN"}


def documents(folder):
    shards = data.UnitShards(folder)
    found = {name: tuple(part.tolist() for part in shards.document(i)) for i, name in enumerate(shards.names)}
    assert len(found) == len(shards)  # no recording twice
    return found


def failures(folder):
    with open(folder / "failures.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "reason"]
    return {Path(name).name: reason for name, reason in rows[1:]}


def test_the_command_writes_good_recordings_to_shards_and_lists_bad_ones(folders, tmp_path, capsys):
    good = write_recordings(tmp_path / "audio")
    out, encoder = tmp_path / "units", load_unit_encoder(folders["50hz"])
    hubert_units.main([str(tmp_path / "audio"), f"--tokenizer={folders['50hz']}", f"--out={out}", "--device=cpu"])
    assert "5 files" in capsys.readouterr().out
    found = documents(out)
    assert sorted(found) == good
    for name, (units, runs) in found.items():
        expected = deduplicate(encoder.encode(read_wav(name)))
        assert (units, runs) == tuple(part.tolist() for part in expected) and sum(runs) == 24  # half a second
    listed = failures(out)
    assert listed.keys() == BAD.keys()
    for name, words in BAD.items():
        assert words in listed[name]
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["files"], meta["failures"], meta["units"]) == (5, 5, sum(len(units) for units, _ in found.values()))
    assert meta["hours"] == pytest.approx(5 * 0.5 / 3600, rel=1e-3) and meta["recipe"] == {**encoder.recipe, "dedup": True}
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


def test_without_deduplication_every_frame_is_a_unit(folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    hubert_units.main([str(tmp_path / "a.wav"), f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--dedup=false",
                       "--layer=1", "--device=cpu"])
    units, runs = documents(tmp_path / "units")[str(tmp_path / "a.wav")]
    assert len(units) == 24 and runs == [1] * 24
    recipe = data.UnitShards(tmp_path / "units").recipe
    assert (recipe["dedup"], recipe["layer"]) == (False, 1)


def test_nothing_to_encode_is_an_error_that_says_why(folders, tmp_path):
    options = [f"--tokenizer={folders['50hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hubert_units.main([str(tmp_path / "nowhere"), *options])
    with pytest.raises(ValueError, match="no audio found"):
        hubert_units.main([str(tmp_path), *options])
    with pytest.raises(ValueError, match="no audio found"):
        hubert_units.main(options)
    (tmp_path / "bad.wav").write_text("this is not audio")
    with pytest.raises(ValueError, match="none of the 1 files.*failures.csv"):
        hubert_units.main([str(tmp_path), *options])
    assert failures(tmp_path / "units").keys() == {"bad.wav"}


def test_two_processes_write_the_same_documents_as_one_and_a_second_run_replaces_them(folders, tmp_path):
    good = write_recordings(tmp_path / "audio")
    arguments = [str(tmp_path / "audio"), f"--tokenizer={folders['50hz']}", "--device=cpu"]
    hubert_units.main([*arguments, f"--out={tmp_path / 'one'}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "hubert_units.py"]
    result = subprocess.run([*launcher, *arguments, f"--out={tmp_path / 'two'}"], cwd=ROOT, capture_output=True, text=True,
                            timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("5 files") == 1  # one process prints
    assert len(list((tmp_path / "two").glob("*.units.bin"))) == 2
    expected = documents(tmp_path / "one")
    assert sorted(expected) == good and documents(tmp_path / "two") == expected
    assert failures(tmp_path / "two") == failures(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("one", "two"))
    assert two == {**one, "hours": pytest.approx(one["hours"])}
    hubert_units.main([*arguments, f"--out={tmp_path / 'two'}"])  # one process, over the shards of two
    assert documents(tmp_path / "two") == expected
