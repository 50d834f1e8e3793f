"""Files that somebody else released, opened by our code: where NANOTWIST_REAL names a folder of them, else skipped.

    $NANOTWIST_REAL/kmeans/hubert_base_ls960_L6_km{50,100,200}.bin   Meta's k-means of HuBERT base, layer 6 (GSLM)
                    kmeans/hubert_large_ll60k_dual/*.bin              of HuBERT large, layer 22, by another project
                    text_lm/stories260K_hf/, tok512.bin               a LLaMA of 260 thousand parameters, trained on TinyStories
                    units/{LJSpeech,VCTK}_hubert100_{val,test}.txt    frame units of real speech, K 100, 50 Hz
                    speech/{librispeech,ljspeech,kathleen}/           recordings of people

What our code reads in them is compared with what the libraries that wrote them read: joblib and scikit-learn, transformers,
soundfile.
"""
import ast
import json
import os
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import soundfile
import torch
import transformers

import hubert_units
import sample
import train
import twist
from checkpoints import download, files
from corpus import __main__ as corpus_command
from corpus.shards import UnitShards
from model import generate
from speech.audio import read_wav
from speech.encoder import deduplicate
from speech.kmeans import fingerprint

REAL = Path(os.environ.get("NANOTWIST_REAL") or "absent")
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="NANOTWIST_REAL names no folder of released files")


def released(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} in NANOTWIST_REAL")
    return path


def estimator(path):
    """scikit-learn's own reading; it warns that the file is older than itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return joblib.load(path)


# ------------------------------------------------------------------------------------------------ k-means

@pytest.fixture
def metas(monkeypatch, tmp_path):
    """Meta's k-means under their known names, as a download would have put them."""
    for k in (50, 100, 200):
        home = tmp_path / "home/kmeans" / f"hubert-base-ls960-kmeans-{k}"
        home.mkdir(parents=True)
        (home / "km.bin").symlink_to(released("kmeans", f"hubert_base_ls960_L6_km{k}.bin"))
    monkeypatch.setenv("NANOTWIST_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("k", (50, 100, 200))
def test_metas_kmeans_are_found_by_name_and_hold_what_scikit_learn_reads(k, metas):
    name = f"hubert-base-ls960-kmeans-{k}"
    file = files.find(name, "kmeans")
    assert download.digest(file) == download.KNOWN["kmeans"][name].files[0].sha256
    centers, theirs = files.read_kmeans(file)[0], estimator(file).cluster_centers_
    assert centers.shape == (k, 768) and np.array_equal(centers.numpy(), theirs.astype(np.float32))


@pytest.mark.parametrize("k, layer", ((128, 22), (500, 22)))
def test_another_projects_kmeans_hold_what_scikit_learn_reads(k, layer):
    file = released("kmeans", "hubert_large_ll60k_dual", f"km_100h_c{k}_layer_{layer}.bin")
    centers, theirs = files.read_kmeans(file)[0], estimator(file).cluster_centers_
    assert centers.shape == (k, 1024) and np.array_equal(centers.numpy(), theirs.astype(np.float32))


@pytest.mark.slow
def test_a_hubert_of_base_width_with_metas_centres_gives_the_units_of_transformers_and_scikit_learn(metas, tmp_path):
    """Released weights of HuBERT base are not at hand: six layers of its width with random ones."""
    torch.manual_seed(0)
    theirs = transformers.HubertModel(transformers.HubertConfig(num_hidden_layers=6)).eval()
    theirs.save_pretrained(tmp_path / "hubert")
    encoder = hubert_units.load_unit_encoder(tmp_path / "hubert", "hubert-base-ls960-kmeans-100")
    assert (encoder.layer, encoder.frame_rate, encoder.num_units) == (6, 50.0, 100)  # as the table of known names says
    clip = read_wav(min(released("speech", "librispeech", "test-other").rglob("*.flac")))[:48_000]
    with torch.no_grad():
        features = theirs(clip[None], output_hidden_states=True).hidden_states[6][0]
    kmeans = estimator(files.find("hubert-base-ls960-kmeans-100", "kmeans"))
    assert encoder.encode(clip).tolist() == kmeans.predict(features.numpy().astype(kmeans.cluster_centers_.dtype)).tolist()


# ------------------------------------------------------------------------------------------------ a text LM

def words():
    """The vocabulary of tok512.bin: tables first, then each word and a zero byte."""
    content = released("text_lm", "tok512.bin").read_bytes()
    return [word.strip(b"\n") for word in content[content.index(b"<unk>"):].split(b"\0")][:512]


def test_a_llama_trained_on_stories_has_the_logits_of_transformers_and_tells_a_story():
    folder = released("text_lm", "stories260K_hf")
    lm, theirs = twist.load_text_lm(folder), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    story = generate(lm, torch.tensor([[1]]), 60, temperature=0.0)
    with torch.no_grad():
        assert (lm(story) - theirs(story).logits).abs().max() < 1e-4
    assert story.tolist() == theirs.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False).tolist()
    told = b"".join(words()[i] for i in story[0, 1:]).decode()
    assert told.startswith(" Once upon a time, there was a little girl named Lily. She loved to play outside")


# ------------------------------------------------------------------------------------------------ units of real speech

@pytest.fixture(scope="session")
def real_units(tmp_path_factory):
    """Folders of shards, imported by the command: {name of the list: folder}, one recording in ten."""
    folder, made = tmp_path_factory.mktemp("units"), {}
    centers = files.read_kmeans(released("kmeans", "hubert_base_ls960_L6_km100.bin"))[0]
    for name in ("LJSpeech_hubert100_val", "LJSpeech_hubert100_test", "VCTK_hubert100_test"):
        rows = [ast.literal_eval(line) for line in released("units", f"{name}.txt").read_text().splitlines()[::10]]
        with open(folder / f"{name}.jsonl", "w") as lines:
            for row in rows:
                units = [int(unit) for unit in row["hubert"].split()]
                lines.write(json.dumps({"units": units, "file_name": row["audio"]}) + "\n")
        corpus_command.main([str(folder / f"{name}.jsonl"), f"--out={folder / name}", "--num-units=100", "--frame-rate=50",
                             "--model=hubert-base-ls960", "--layer=6", f"--centers={fingerprint(centers)}", "--dedup"])
        made[name] = folder / name, rows
    return made


def test_units_of_real_speech_are_imported_one_for_one(real_units):
    for folder, rows in real_units.values():
        shards = UnitShards(folder)
        assert shards.recipe["dedup"] and len(shards) == len(rows)
        for row, (name, units, runs) in zip(rows, shards, strict=True):
            expected, lengths = deduplicate(np.array(row["hubert"].split(), dtype=np.int64))
            assert (name, units.tolist(), runs.tolist()) == (row["audio"], expected.tolist(), lengths.tolist())


@pytest.mark.slow
def test_a_real_text_lm_trains_on_real_units(real_units, tmp_path):
    """Further than knowing how often each unit comes."""
    lm, train_units, val_units = released("text_lm", "stories260K_hf"), *(real_units[f"LJSpeech_hubert100_{part}"][0]
                                                                         for part in ("val", "test"))
    train.main([f"--lm={lm}", f"--data={train_units}", f"--val-data={val_units}", f"--out={tmp_path}", "--steps=60",
                "--tokens-per-step=1024", "--block-size=128", "--peak-lr=3e-3", "--eval-interval=60", "--save-interval=60",
                "--eval-rows=16", "--dtype=float32"])
    slm, vocab = twist.load_speech_lm(tmp_path / "model")
    log = (tmp_path / "log.csv").read_text().splitlines()
    val_loss = float(dict(zip(log[0].split(","), log[-1].split(",")))["val_loss"])
    shards = UnitShards(train_units)
    counts = np.bincount(np.concatenate([units for _, units, _ in shards]), minlength=100) + 1.0
    shares = counts / counts.sum()
    assert val_loss < -(shares * np.log(shares)).sum() - 0.2
    assert vocab.recipe == shards.recipe and slm.config.n_layer == 5


# ------------------------------------------------------------------------------------------------ recordings of people

@pytest.mark.parametrize("source, rate", (("librispeech", 16_000), ("kathleen", 16_000), ("ljspeech", 22_050)))
def test_recordings_of_people_are_read_to_their_last_sample(source, rate):
    for path in sorted(released("speech", source).rglob("*.flac"))[::8]:
        theirs, theirs_rate = soundfile.read(path, dtype="float32")
        ours = read_wav(path)
        assert theirs_rate == rate and len(ours) == -(-len(theirs) * 16_000 // rate)
        if rate == 16_000:
            assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.slow
def test_librispeech_becomes_shards_with_its_names_and_seconds(tmp_path):
    folder = released("speech", "librispeech", "test-other")
    hubert_units.main([str(folder), f"--out={tmp_path}"])
    shards, found = UnitShards(tmp_path), sorted(folder.rglob("*.flac"))
    assert shards.meta["failures"] == 0 and len(shards) == len(found)
    seconds = {Path(file["file_name"]).name: file["seconds"] for file in shards.each_file()}
    assert seconds == {path.name: pytest.approx(soundfile.info(path).duration, abs=1e-3) for path in found}


def test_a_recording_of_a_person_is_continued(tmp_path):
    prompt = min(released("speech", "kathleen").glob("*.flac"))
    sample.main([str(prompt), f"--out={tmp_path}"])
    wav = read_wav(tmp_path / f"{prompt.stem}_0.wav")
    assert len(wav) > 48_000 and wav.abs().max() > 0.01
