"""The factory of the pocket world, on recordings that are made up: what it learns from, how, and how that is judged."""
import csv
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from torch.nn import functional

import sample
from checkpoints import files
from corpus.shards import write_shards
from hubert_units import load_unit_encoder
from pocket import augment, measure, people, recordings, teacher, train_hubert, train_vocoder
from speech.audio import SAMPLE_RATE, read_wav, write_wav
from speech.kmeans import nearest_centers
from speech.spoken import faded
from vocoder import load_vocoder

HOP, FIELD = recordings.HOP, recordings.FIELD


def sound(seconds, seed=0):
    """Something with syllables: a harmonic tone whose pitch and level wander, (S,) float32."""
    generator = torch.Generator().manual_seed(seed)
    samples, knots = round(seconds * SAMPLE_RATE), round(seconds * 5) + 2
    pitch, level = (functional.interpolate(torch.rand(1, 1, knots, generator=generator), samples, mode="linear")[0, 0]
                    for _ in range(2))
    phase = torch.cumsum(2 * torch.pi * (90 + 120 * pitch) / SAMPLE_RATE, 0)
    return 0.4 * level * (torch.sin(phase) + 0.5 * torch.sin(3 * phase) + 0.2 * torch.sin(8 * phase)) / 1.7


def record(folder, names, seconds=2.0):
    for seed, name in enumerate(names):
        write_wav(Path(folder) / name, sound(seconds, seed))


def write_table(folder, rows):
    with open(Path(folder) / recordings.TABLE, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([recordings.COLUMNS, *rows])


# -------------------------------------------------------------------------------------------------- recordings of people

def test_recordings_of_people_are_divided_and_nothing_of_them_is_lost(tmp_path, capsys):
    source = tmp_path / "source"
    record(source / "anna", [f"{i}.wav" for i in range(3)], 1.0)
    record(source / "libri/deep", [f"{speaker}-7-{i:04}.wav" for speaker in range(40, 70) for i in range(2)], 0.5)
    (source / "anna/transcripts.tsv").write_text("0.wav\tA word.\n")
    (source / "phones.tsv").write_text("anna/0.wav\t0.00:SIL 0.30:W\n")
    (source / "anna/broken.wav").write_bytes(b"no sound")
    people.main([f"--recordings={source}", f"--out={tmp_path / 'out'}"])
    tables = {part: recordings.read_table(tmp_path / "out" / part) for part in ("train", "val")}
    voices = {part: {row["voice"] for row in table.values()} for part, table in tables.items()}
    assert voices["train"] & voices["val"] == {"quiet"} and len(voices["val"]) > 1  # held-out voices are heard nowhere else
    assert len(tables["train"]) + len(tables["val"]) == 63 + 60 + 6  # and of silence
    row = next(row for table in tables.values() for path, row in table.items() if path.endswith("anna/0.flac"))
    assert (row["text"], row["phones"]) == ("A word.", "0.00:SIL 0.30:W")
    for path, row in [*tables["train"].items(), *tables["val"].items()]:
        if row["voice"] != "quiet":
            original, = source.rglob(f"{Path(path).stem}.wav")
            assert torch.equal(read_wav(path), read_wav(original))
    quiet = [read_wav(path).abs().max().item() for path, row in tables["val"].items() if row["voice"] == "quiet"]
    assert min(quiet) == 0 and 0 < max(quiet) < 0.5
    printed = capsys.readouterr()
    assert "broken.wav" in printed.err and "left out" in printed.err and "1 with phones" in printed.out
    with pytest.raises(ValueError, match="give another --out"):
        people.main([f"--recordings={source}", f"--out={tmp_path / 'out'}"])


def test_recordings_of_one_name_and_voice_are_all_kept(tmp_path, capsys):
    record(tmp_path / "a/anna", ["1.wav", "1.flac"], 0.5)
    record(tmp_path / "b/anna", ["1.wav"], 1.0)
    people.main([f"--recordings={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert "0 of 3 files could not be read" in capsys.readouterr().out
    kept = sorted((tmp_path / "out").glob("*/anna/*"))
    assert sorted(path.name for path in kept) == ["1-2.flac", "1-3.flac", "1.flac"]
    assert sorted(len(read_wav(path)) for path in kept) == [8000, 8000, 16_000]
    record(tmp_path / "c/quiet", ["1.wav"], 0.5)
    with pytest.raises(ValueError, match="rename the folder"):
        people.main([f"--recordings={tmp_path / 'c'}", f"--out={tmp_path / 'other'}"])


def test_more_recordings_leave_the_others_on_their_side():
    some = {"many": [Path(f"many/{i}.wav") for i in range(300)]} | {str(i): [Path(f"{i}/a.wav")] for i in range(100)}
    more = some | {"many": [Path(f"many/{i}.wav") for i in range(500)]} | {str(i): [Path(f"{i}/a.wav")] for i in range(200)}
    known = {path for paths in some.values() for path in paths}
    assert people.held_out(some) == people.held_out(more) & known
    assert 5 <= len([path for path in people.held_out(some) if path.parent.name == "many"]) <= 30
    assert people.held_out({"one": [Path("one/a.wav"), Path("one/b.wav")]})  # never nothing


def test_what_sounds_at_the_centre_of_a_frame_is_its_phone(tmp_path):
    record(tmp_path, ["a/1.wav", "a/2.wav", "b/3.wav"], 1.0)
    write_table(tmp_path, [["a/1.wav", "anna", "said", "0.00:SIL 0.30:W 0.62:'ER"], ["b/3.wav", "", "", ""]])
    speech = recordings.Speech(tmp_path)
    assert speech.voices == ["anna", "a", "b"] and speech.texts == ["said", "", ""]
    labels, phones = speech.phone_labels()
    first, second, third = labels.split(speech.frames.tolist())
    centers = (np.arange(len(first)) * HOP + FIELD / 2) / SAMPLE_RATE
    assert [phones[label] for label in first] == ["ER" if time >= 0.62 else "W" if time >= 0.3 else "SIL" for time in centers]
    assert set(second.tolist()) == set(third.tolist()) == {-1}
    assert torch.equal(speech.wave(1, 3, 4), read_wav(tmp_path / "a/2.wav")[3 * HOP:6 * HOP + FIELD])
    (tmp_path / recordings.TABLE).write_text("name\twhat\n1\t2\n")
    with pytest.raises(ValueError, match="columns name, what; expected file, voice"):
        recordings.Speech(tmp_path)


# -------------------------------------------------------------------------------------------------- changes of recordings

def test_noise_has_its_level_and_other_speed_is_what_interpolation_gives():
    generator = torch.Generator().manual_seed(0)
    wave, other = sound(1.0), augment.noise(SAMPLE_RATE, generator)
    assert other.square().mean() == pytest.approx(1, rel=1e-4)
    for decibel in (0.0, 20.0):
        added = augment.at_level(wave, other, decibel) - wave
        assert 10 * math.log10(wave.square().mean() / added.square().mean()) == pytest.approx(decibel, abs=1e-3)
    at = np.arange(5000) * 1.1
    assert np.allclose(augment.resampled(wave, 1.1, 5000), np.interp(at, np.arange(len(wave)), wave), atol=1e-3)


def test_changed_recordings_stay_as_long_and_differ():
    wave, other = sound(1.0), sound(0.5, 1)
    made = [augment.changed(wave, other, torch.Generator().manual_seed(seed)) for seed in range(12)]
    assert all(each.shape == wave.shape and each.isfinite().all() for each in made)
    assert len({round(each.square().mean().item(), 9) for each in made}) == 12
    assert torch.equal(augment.changed(wave, other, torch.Generator().manual_seed(3)), made[3])


def test_labels_follow_the_speed_of_a_crop(tmp_path, monkeypatch):
    """A recording that rises all the time says where each sample was."""
    frames = 150
    ramp = torch.arange((frames - 1) * HOP + FIELD) / (frames * HOP + FIELD)
    write_wav(tmp_path / "v/ramp.wav", ramp)
    speech = recordings.Speech(tmp_path)
    options = train_hubert.HubertTrainConfig(targets=("some",), batch=6, crop_frames=60)
    monkeypatch.setattr(augment, "changed", lambda wave, other, generator: wave)
    crops = train_hubert.Crops(speech, torch.arange(frames)[None], options)
    waves, lengths, labels, mask = crops.draw(0)
    assert waves.shape == (6, 59 * HOP + FIELD) and labels.shape == (1, 6, 60) and mask.shape == (6, 60)
    assert 0.3 < mask.float().mean() < 0.9
    for wave, row in zip(waves, labels[0]):
        middle = wave[HOP * torch.arange(60) + FIELD // 2] * (frames * HOP + FIELD)  # where each frame's centre was
        assert ((middle - FIELD / 2) / HOP - row).abs().max() < 0.51
    again, other = crops.draw(0), crops.draw(1)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, (waves, lengths, labels, mask)))
    assert not torch.equal(other[0], waves)


# -------------------------------------------------------------------------------------------------- targets, heads, judgement

def test_targets_are_the_units_of_every_frame_and_what_does_not_fit_is_said(tmp_path):
    record(tmp_path / "speech", ["v/1.wav", "v/2.wav"], 1.0)
    speech = recordings.Speech(tmp_path / "speech")
    frames = int(speech.frames[0])
    documents = [(name, np.array([3, 1]), np.array([frames - 4, 4]), 1.0) for name in speech.names]
    recipe = {"kind": "teacher", "num_units": 5, "frame_rate": 25.0, "dedup": True}
    write_shards(tmp_path / "good", recipe, documents)
    labels, kinds = train_hubert.read_targets(tmp_path / "good", speech)
    assert kinds == 5 and labels.tolist() == 2 * ([3] * (frames - 4) + [1] * 4)
    write_shards(tmp_path / "fewer", recipe, documents[:1])
    write_shards(tmp_path / "short", recipe, [(name, units, runs - 1, 1.0) for name, units, runs, _ in documents])
    write_shards(tmp_path / "fast", recipe | {"frame_rate": 50.0}, documents)
    for folder, sentence in (("fewer", "has no units of .*2.wav"), ("short", f"{frames - 2} frames of units.*expected {frames}"),
                             ("fast", "50.0 units a second, expected 25")):
        with pytest.raises(ValueError, match=sentence):
            train_hubert.read_targets(tmp_path / folder, speech)


def test_the_likeliest_unit_is_the_nearest_centre():
    torch.manual_seed(0)
    head, x = train_hubert.Centers(30, 16), torch.randn(500, 16)
    assert torch.equal(head(x).argmax(1), nearest_centers(x, head.centers.detach())[1])
    gap = head(x) + torch.cdist(x, head.centers).square() / 2  # the same number for every unit
    assert (gap - gap[:, :1]).abs().max() < 1e-4


def test_quality_is_what_scikit_learn_counts():
    generator = torch.Generator().manual_seed(0)
    phones, voices = torch.randint(-1, 9, (4000,), generator=generator), torch.randint(5, (4000,), generator=generator)
    units = (phones + torch.randint(3, (4000,), generator=generator)).clamp(min=0)
    found, known = train_hubert.quality(units, phones, voices), phones >= 0
    entropy = mutual_info_score(phones[known], phones[known])
    assert found["pnmi"] == pytest.approx(mutual_info_score(phones[known], units[known]) / entropy)
    assert found["speaker_nmi"] == pytest.approx(normalized_mutual_info_score(voices, units))
    pairs = Counter(zip(units[known].tolist(), phones[known].tolist()))
    best = {unit: max(count for (other, _), count in pairs.items() if other == unit) for unit, _ in pairs}
    assert found["purity"] == pytest.approx(sum(best.values()) / int(known.sum()))
    assert set(train_hubert.quality(units, torch.full_like(phones, -1), voices)) == {"speaker_nmi", "used"}


def test_voices_with_many_recordings_are_judged_by_themselves_and_silence_not_at_all(tmp_path):
    record(tmp_path, ["a/1.wav", "a/2.wav", "a/3.wav", "b/4.wav", "quiet/5.wav"], 1.0)
    speech = recordings.Speech(tmp_path)
    units = torch.zeros(int(speech.frames.sum()), dtype=torch.long)
    units[speech.frame_starts[3]:] = 1
    found = train_hubert.judged(units, speech, ["here"], apart=3)
    assert {name: value["used"] for name, value in found.items()} == {"here": 2, "here, a": 1, "here, other voices": 1}
    assert found["here"]["speaker_nmi"] == pytest.approx(1) and set(train_hubert.judged(units, speech, ["here"])) == {"here"}


SMALL = ["--batch=2", "--crop-frames=30", "--width=64", "--layers=2", "--threads=1", "--eval-interval=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """speech/ and held_out/ of made-up voices, and targets/ of the first."""
    folder = tmp_path_factory.mktemp("factory")
    record(folder / "speech", [f"{voice}/{i}.wav" for voice in "abc" for i in range(4)])
    record(folder / "held_out", [f"d/{i}.wav" for i in range(2)])
    speech = recordings.Speech(folder / "speech")
    write_shards(folder / "targets", {"kind": "teacher", "num_units": 7, "frame_rate": 25.0, "dedup": True}, (
        (name, np.arange(int(frames)) % 7, np.ones(int(frames), int), 2.0) for name, frames in zip(speech.names, speech.frames)))
    return folder


def pretrain(world, out, *more):
    train_hubert.main([f"--speech={world}/speech", f"--val={world}/held_out", f"--out={out}", *SMALL, *more])
    return load_unit_encoder(out)


def test_a_taught_hubert_opens_as_a_tokenizer_and_its_centres_are_those_it_learnt(world, tmp_path, capsys):
    encoder = pretrain(world, tmp_path / "hubert", f"--targets={world}/targets", "--steps=4")
    assert (encoder.layer, encoder.num_units, encoder.frame_rate) == (2, 7, 25.0)
    kept = torch.load(tmp_path / "hubert/best.pt", weights_only=True)
    assert torch.equal(encoder.centers, kept["heads"]["0.centers"])
    quality = json.loads((tmp_path / "hubert/quality.json").read_text())
    found = quality["results"]["final targets"][f"{world}/held_out"]
    assert quality["layer"] == 2 and set(found) == {"used"}  # no phones are known, and there is one voice
    assert "which did best on held-out recordings" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a finished tokenizer"):
        pretrain(world, tmp_path / "hubert", f"--targets={world}/targets", "--steps=4")


def test_without_targets_nothing_but_recordings_is_needed(world, tmp_path):
    encoder = pretrain(world, tmp_path / "hubert", "--steps-1=2", "--steps-2=2", "--target-layer=1", "--num-units=6",
                       "--targets-1=5", "--targets-2=6")
    assert encoder.num_units == 6
    results = json.loads((tmp_path / "hubert/quality.json").read_text())["results"]
    assert {"mfcc", "iteration 1 layer 1", "final layer 2"} <= set(results)


def test_a_stopped_run_goes_on_to_the_same_bits(world, tmp_path, monkeypatch):
    whole = pretrain(world, tmp_path / "whole", f"--targets={world}/targets", "--steps=4")
    drawn = train_hubert.Crops.draw

    def stopping(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return drawn(self, step)
    monkeypatch.setattr(train_hubert.Crops, "draw", stopping)
    arguments = f"--targets={world}/targets", "--steps=4", "--save-minutes=0"
    with pytest.raises(KeyboardInterrupt):
        pretrain(world, tmp_path / "parts", *arguments)
    monkeypatch.setattr(train_hubert.Crops, "draw", drawn)
    parts = pretrain(world, tmp_path / "parts", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(whole.hubert.state_dict().values(), parts.hubert.state_dict().values()))
    assert torch.equal(whole.centers, parts.centers)


# -------------------------------------------------------------------------------------------------- a teacher

class Spectrum:
    """In place of a recogniser's encoder: 288 magnitudes at every 24 ms."""

    def run(self, _, inputs):
        wave = torch.from_numpy(inputs["input_values"][0])
        frames = wave.unfold(0, teacher.SEEN, teacher.STRIDE)
        return [torch.fft.rfft(frames, 1022).abs()[None, :, :teacher.WIDTH].numpy()]


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(teacher.Encoder, "__init__", lambda self, threads: setattr(self, "session", Spectrum()))


def test_features_of_a_long_recording_are_those_of_its_pieces_and_lie_at_the_frames(heard, monkeypatch):
    wave, encoder = sound(9.0), teacher.Encoder(1)
    whole = encoder(wave)
    assert whole.shape == ((len(wave) - FIELD) // HOP + 1, teacher.WIDTH)
    monkeypatch.setattr(teacher, "LONGEST", 4)
    pieces = encoder(wave)
    # features lie 24 ms apart, at other times in each piece: between them they are interpolated
    assert pieces.shape == whole.shape and functional.cosine_similarity(whole, pieces).min() > 0.8
    assert encoder(wave[:FIELD]).shape == (1, teacher.WIDTH)
    click = torch.zeros(5 * SAMPLE_RATE)
    click[50 * HOP + FIELD // 2] = 1.0
    assert abs(int(encoder(click).square().sum(1).argmax()) - 50) <= 1


@pytest.mark.parametrize("known", (True, False))
def test_a_teacher_writes_units_of_every_recording_whether_phones_are_known_or_not(known, heard, world, tmp_path, capsys):
    speech = tmp_path / "speech"
    shutil.copytree(world / "speech", speech)
    if known:
        write_table(speech, [[f"a/{i}.wav", "a", "", "0.00:SIL 0.50:AA 1.20:S"] for i in range(4)])
    teacher.main([f"--speech={speech}", f"--out={tmp_path / 'out'}", "--num-units=4,9", "--steps=30", "--batch=32"])
    heard_by, text = recordings.Speech(speech), capsys.readouterr().out
    for name, kinds in (("k4", 4), ("k9", 9), *([("phones", 3)] if known else [])):
        labels, count = train_hubert.read_targets(tmp_path / "out" / name, heard_by)
        assert count == kinds and len(labels) == heard_by.frames.sum() and int(labels.max()) < kinds
    assert ("are read rightly" if known else "the features are whitened") in text
    with pytest.raises(ValueError, match="give another --out"):
        teacher.main([f"--speech={speech}", f"--out={tmp_path / 'out'}", "--num-units=4"])


def test_without_its_packages_the_teacher_says_how_they_are_installed(monkeypatch):
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"moonshine_voice and onnxruntime not installed: pip install -e .\[factory\]"):
        teacher.Encoder(1)


# -------------------------------------------------------------------------------------------------- two voices

VOICE = ["--steps=3", "--batch=2", "--crop=8", "--width=32", "--embedding=8", "--held-out=1", "--bf16=false", "--adversarial=0.4"]


def test_a_vocoder_of_two_voices_speaks_with_both_by_name(world, tmp_path):
    recipe = {"kind": "hubert", "num_units": 7, "layer": 1, "centers": "x", "frame_rate": 25.0, "dedup": True}
    for voice in "ab":
        rows = [(str(path), np.arange(49) % 7, np.ones(49, int), 2.0) for path in sorted((world / "speech" / voice).iterdir())]
        write_shards(tmp_path / voice, recipe, rows)
    arguments = [f"--units={tmp_path}/a,{tmp_path}/b", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'voices'}", *VOICE]
    with pytest.raises(ValueError, match="1 --speakers for 2 folders"):
        train_vocoder.main([*arguments, "--speakers=anna"])
    train_vocoder.main([*arguments, "--speakers=anna,ben"])
    vocoder = load_vocoder(tmp_path / "voices")
    assert vocoder.speakers == ["anna", "ben"] and vocoder.recipe == recipe
    units = torch.arange(7)
    anna, ben, first = (vocoder(units, torch.ones(7, dtype=torch.long), speaker) for speaker in ("anna", "ben", None))
    assert torch.equal(anna, first) and not torch.equal(anna, ben)


@pytest.mark.slow
def test_a_stopped_vocoder_goes_on_with_the_options_that_it_wrote_down(world, tmp_path, capsys):
    recipe = {"kind": "hubert", "num_units": 7, "layer": 1, "centers": "x", "frame_rate": 25.0, "dedup": True}
    rows = [(str(path), np.arange(49) % 7, np.ones(49, int), 2.0) for path in sorted((world / "speech/a").iterdir())]
    write_shards(tmp_path / "units", recipe, rows)
    for bf16 in ("true", "false"):
        arguments = [f"--units={tmp_path}/units", f"--run={tmp_path / bf16}", *VOICE[:-2], f"--bf16={bf16}", "--adversarial=0"]
        train_vocoder.main([*arguments, f"--out={tmp_path / 'first'}_{bf16}"])
        train_vocoder.main([*arguments, f"--out={tmp_path / 'again'}_{bf16}"])
        assert "going on from step 3" in capsys.readouterr().out


@pytest.mark.slow
def test_durations_add_up_and_silence_does_not_lengthen_them(tmp_path):
    """A voice with long pauses among its recordings: what it says is as long as it was."""
    record(tmp_path / "a", [f"{i}.wav" for i in range(6)], 10.0)
    recipe = {"kind": "hubert", "num_units": 9, "layer": 1, "centers": "x", "frame_rate": 25.0, "dedup": True}
    runs = np.tile([1, 2, 4, 2], 40)[:110]
    said = (np.arange(110) % 8, runs, 2.0)
    frames = (10 * SAMPLE_RATE - FIELD) // HOP + 1
    said[1][-1] += frames - said[1].sum()
    rows = [(str(path), *(said if i % 2 else (np.array([8]), np.array([frames]), 2.0)))
            for i, path in enumerate(sorted((tmp_path / "a").iterdir()))]
    write_shards(tmp_path / "units", recipe, rows)
    train_vocoder.main([f"--units={tmp_path}/units", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'voice'}", "--steps=150",
                        "--batch=2", "--crop=4", "--width=32", "--embedding=16", "--held-out=2", *VOICE[-2:-1],
                        "--adversarial=0"])
    predicted = load_vocoder(tmp_path / "voice").durations(torch.from_numpy(said[0]))
    assert int(predicted.sum()) == pytest.approx(int(said[1].clip(max=train_vocoder.LONGEST_RUN).sum()), rel=0.1)


# -------------------------------------------------------------------------------------------------- measures

RECOGNISER = """
import pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.wav")):
    print(f"{path.name}\\tone two three four")
"""


def test_words_are_held_against_what_was_said_and_else_against_what_is_heard(world, tmp_path, capsys):
    record(tmp_path / "speech", ["a/1.wav", "a/2.wav"])
    write_table(tmp_path / "speech", [["a/1.wav", "a", "One two, three five!", ""]])
    (tmp_path / "hears.py").write_text(RECOGNISER)
    arguments = ["--what=words", f"--speech={tmp_path / 'speech'}", f"--out={tmp_path}"]
    measure.main([*arguments, f"--recogniser={sys.executable} {tmp_path / 'hears.py'}"])
    found = json.loads((tmp_path / "pocket_words.json").read_text())
    said, heard = (found[f"{tmp_path / 'speech'}, against what was {how}"] for how in ("said", "heard in the originals"))
    assert (said["words"], said["original"], said["re-synthesis"]) == (4, 0.25, 0.25) and heard["original"] == 0
    for recogniser, sentence in (("", "give --recogniser"), (f"{sys.executable} -c 'raise SystemExit(3)'", "failed")):
        with pytest.raises(ValueError, match=sentence):
            measure.main([*arguments, f"--recogniser={recogniser}"])
    capsys.readouterr()


@pytest.mark.slow
def test_the_round_trip_and_units_of_the_bundle_are_measured(tmp_path, capsys):
    record(tmp_path / "speech", [f"{voice}/{i}.wav" for voice in "ab" for i in range(2)])
    common = [f"--speech={tmp_path / 'speech'}", f"--out={tmp_path}"]
    measure.main(["--what=vocoder", "--own=a", *common])
    found = json.loads((tmp_path / "pocket_vocoder.json").read_text())
    assert set(found) >= {"level of", "the vocoder's voice, predicted durations", "other voices, copy-synthesis"}
    measure.main(["--what=units", *common])
    measure.main(["--what=units", "--num-units=5", f"--fit-speech={tmp_path / 'speech'}", *common])
    assert json.loads((tmp_path / "pocket_units.json").read_text())["K"] == 5
    capsys.readouterr()


# -------------------------------------------------------------------------------------------------- the bundle

def test_speech_that_is_cut_fades():
    wav = torch.ones(4000)
    end = faded(wav)
    assert torch.equal(end[:2400], wav[:2400]) and end[-1].abs() < 1e-6 and (end[2400:].diff() <= 0).all()
    assert end[3200] == pytest.approx(0.5, abs=0.01)
    assert faded(torch.ones(5)).shape == (5,) and faded(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("level", (0.0, 1e-3))
def test_silence_stays_silence(level):
    encoder, vocoder = load_unit_encoder(), load_vocoder()
    wav = level * torch.randn(3 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    units = torch.unique_consecutive(encoder.encode(wav))
    for speaker in range(max(1, vocoder.config.num_speakers)):
        assert vocoder(units, None, speaker).square().mean().sqrt() < 0.01


def test_a_prompt_without_speech_is_told(tmp_path, capsys):
    write_wav(tmp_path / "nothing.wav", 1e-3 * torch.randn(3 * SAMPLE_RATE, generator=torch.Generator().manual_seed(0)))
    for more in (["--resynth"], ["--max-new-units=5"]):
        sample.main([str(tmp_path / "nothing.wav"), str(files.POCKET / "prompt.wav"), f"--out={tmp_path}", *more])
        told = [line for line in capsys.readouterr().out.splitlines() if "hears silence" in line]
        assert len(told) == 1 and told[0].startswith(f"{tmp_path}/nothing.wav: ")


def test_the_bundle_is_small():
    root = files.POCKET.parent
    tracked = subprocess.run(["git", "ls-files", "-z", "pocket"], cwd=root, capture_output=True, text=True, check=True).stdout
    sizes = {name: (root / name).stat().st_size for name in tracked.split("\0") if name}
    assert sum(sizes.values()) < 30e6 and max(sizes.values()) < 10e6, sizes
