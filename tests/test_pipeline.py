"""From wav to wav with the bundled pocket world and with published names, and what happens to inputs that cannot work."""
import dataclasses
import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_hubert_units import BASE, SLOW, fairseq_names, noise, perturb

import config
import eval as evaluate
import hubert_units
import sample
import train
import twist
import vocoder
from checkpoints import download, known, pretrained
from checkpoints.files import read_json, read_tensors, write_json, write_model, write_tensors
from model import TransformerConfig, generate
from speech import hubert
from speech.audio import read_wav, write_wav
from vocoder import DurationConfig, Vocoder, VocoderConfig, load_vocoder

ROOT = Path(__file__).parent.parent
PROMPT = ROOT / "pocket/prompt.wav"
GOLDEN = [  # frame units of the bundled prompt, in order of time
    26, 26, 26, 26, 59, 59, 59, 141, 141, 168, 168, 100, 100, 95, 139, 139, 35, 35, 172, 16, 104, 68, 16, 157, 117, 99,
    117, 63, 63, 63, 39, 39, 55, 55, 55, 166, 190, 4, 4, 100, 100, 70, 70, 70, 30, 174, 18, 18, 6, 6, 66, 6, 6, 158, 158,
    92, 92, 190, 160, 25, 25, 25, 191, 191, 139, 193, 193, 134, 194, 194, 97, 97, 97, 79, 146, 150, 150, 150, 7, 4, 4,
    190, 190, 149, 66, 66, 120, 120, 120, 165, 193, 134, 156, 40, 40, 39, 88, 174, 190, 190, 4, 4,
]


def launch(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_prompt_gets_a_continuation_that_can_be_heard_and_repeated(tmp_path, capsys):
    for out in ("a", "b"):
        sample.main([str(PROMPT), f"--out={tmp_path / out}", "--num-samples=2", "--seed=3", "--max-new-units=40",
                     "--continuation-only=true"])
    assert "units per second" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["prompt_0.wav", "prompt_0_continuation.wav", "prompt_1.wav", "prompt_1_continuation.wav"]
    for name in names:
        info = soundfile.info(tmp_path / "a" / name)
        assert (info.samplerate, info.channels) == (16000, 1)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert read_wav(tmp_path / "a" / name).square().mean().sqrt() > 0.01
    whole, alone = (read_wav(tmp_path / "a" / name) for name in names[:2])
    assert 2.5 * 16000 < len(whole) - len(alone) <= 3 * 16000  # the first three seconds, in whole frames
    assert torch.equal(whole[-len(alone):], alone)
    assert names and (tmp_path / "a/prompt_0.wav").read_bytes() != (tmp_path / "a/prompt_1.wav").read_bytes()


def test_continuations_are_drawn_among_the_fifty_likeliest_as_in_the_demonstration(tmp_path, monkeypatch):
    """transformers' generate, which the demonstration calls, takes 50 where it is told nothing; `none` is all."""
    assert "the 50 likeliest" in sample.__doc__
    seen = []
    monkeypatch.setattr(sample, "generate", lambda *given, **options: seen.append(given[4]) or generate(*given, **options))
    for option in ([], ["--top-k=none"], ["--top-k=3"]):
        sample.main([str(PROMPT), f"--out={tmp_path}", "--max-new-units=5", "--prompt-seconds=1", *option])
    assert seen == [50, None, 3]


def test_any_format_rate_and_channel_count_will_do_as_a_prompt(tmp_path):
    wav = read_wav(PROMPT).numpy()
    stereo = np.repeat(np.stack([wav, wav], axis=1), 3, axis=0)
    soundfile.write(tmp_path / "loud.flac", stereo, 48000)
    sample.main([str(tmp_path / "loud.flac"), f"--out={tmp_path}", "--max-new-units=10"])
    assert (tmp_path / "loud_0.wav").exists()


@pytest.mark.slow
def test_no_speech_replaces_other_speech_and_the_same_command_its_own(tmp_path, capsys):
    """Prompts of one name, another model behind the same path, other seeds: each gets files of its own."""
    for speaker in ("A", "B"):
        (tmp_path / speaker).mkdir()
        shutil.copy(PROMPT, tmp_path / speaker / "1.wav")
    vocab = twist.load_speech_lm()[1]
    lm = twist.load_text_lm()
    twist.save_speech_lm(twist.warm_start(lm, vocab), vocab, tmp_path / "model")
    both = [str(tmp_path / speaker / "1.wav") for speaker in "AB"]
    seen = {}

    def listed(*arguments):
        sample.main([*arguments, f"--out={tmp_path}/out", "--max-new-units=5", "--prompt-seconds=1"])
        found = [Path(line) for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
        for path, content in seen.items():
            assert path.read_bytes() == content
        seen.update({path: path.read_bytes() for path in found})
        assert seen.keys() == {*(tmp_path / "out").iterdir()}
        return [path.name for path in found]

    assert listed(*both) == listed(*both) == ["1_0.wav", "1_0-2.wav"]
    assert listed(both[1], both[1]) == ["1_0-2.wav"]
    other = [f"--model={tmp_path}/model", "--num-samples=2", "--continuation-only"]
    names = [f"1_{i}{kind}-3.wav" for i in (0, 1) for kind in ("", "_continuation")]
    assert listed(both[0], *other) == names
    twist.save_speech_lm(twist.warm_start(lm, vocab, seed=1), vocab, tmp_path / "model")
    assert listed(both[0], *other) == [name.replace("-3", "-4") for name in names]
    assert listed(both[0], "--seed=1") == ["1_0-5.wav"]
    assert listed(*both, "--resynth") == ["1_resynth.wav", "1_resynth-2.wav"]
    seen[tmp_path / "out/1_0-2.wav"] = b"whatever it is, it stays"
    (tmp_path / "out/1_0-2.wav").write_bytes(b"whatever it is, it stays")
    assert listed(both[1]) == ["1_0-6.wav"]
    record = soundfile.SoundFile(tmp_path / "out/1_0-5.wav").comment.split(" ", 1)[1]
    assert (json.loads(record)["seed"], json.loads(record)["source"]) == (1, both[0])


def long_prompt(folder, seconds=24):
    wav = read_wav(PROMPT)
    write_wav(folder / "long.wav", wav.repeat(6)[:seconds * 16000])
    return folder / "long.wav"


@pytest.mark.slow
def test_what_the_window_of_the_model_leaves_out_is_said_once(tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copy(PROMPT, tmp_path / f"{name}.wav")
    sample.main([str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), f"--out={tmp_path}/out", "--max-new-units=1000"])
    printed = capsys.readouterr().out
    assert printed.count("at most 215 new units, not --max-new-units=1000") == 1 and "window of 256 ids" in printed
    sample.main([str(PROMPT), f"--out={tmp_path}/out", "--max-new-units=10"])
    assert "the model's window" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 20])
def test_of_a_prompt_that_is_too_long_the_end_is_heard(seconds, tmp_path, capsys):
    path = long_prompt(tmp_path)
    slm, vocab = twist.load_speech_lm()
    encoder, voice = sample.load_voice(sample.SampleConfig(), vocab)
    options = sample.SampleConfig(prompt_seconds=seconds, max_new_units=20)
    whole, lengths = hubert_units.speech_to_units(path, encoder, seconds)
    units, runs, room = sample.fit_window(path, whole, lengths, options, slm, vocab, voice, notes := {})
    assert torch.equal(units, whole[-len(units):]) and torch.equal(runs, lengths[-len(units):])
    assert room == 20 and 1 + len(units) + room == slm.config.block_size
    assert f"it hears the last {int(runs.sum()) / 25:.1f} s" in notes["prompt"] and "window" not in notes
    more = dataclasses.replace(options, max_new_units=1000)
    units, _, room = sample.fit_window(path, whole, lengths, more, slm, vocab, voice, notes)
    assert 127 <= room <= 128 and "at most" in notes["window"]  # half of the window at most
    units, _, room = sample.fit_window(path, whole[:70], lengths[:70], options, slm, vocab, voice, notes := {})
    assert torch.equal(units, whole[:70]) and room == 185 and not notes  # it fits: as it was asked for
    sample.main([str(path), f"--out={tmp_path}/out", f"--prompt-seconds={seconds}", "--max-new-units=5"])
    assert "it hears the last" in capsys.readouterr().out and (tmp_path / "out/long_0.wav").exists()


def test_folders_and_quoted_patterns_of_recordings_are_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("deep/er/a.wav", "deep/b.wav", "c.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROMPT, name)
    (tmp_path / "deep/broken.wav").write_text("no sound")
    with pytest.raises(SystemExit):
        sample.main(["deep", "*.wav", "--out=out", "--max-new-units=3"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_0.wav", "b_0.wav", "c_0.wav"]
    assert "1 of 4 prompts could not be spoken" in capsys.readouterr().out
    hubert_units.main(["*.wav", "--out=units"])
    assert "1 files" in capsys.readouterr().out


def test_resynthesis_needs_no_language_model(tmp_path):
    sample.main([str(PROMPT), f"--out={tmp_path}", "--resynth", "--model=nowhere"])
    assert len(read_wav(tmp_path / "prompt_resynth.wav")) == pytest.approx(len(read_wav(PROMPT)), rel=0.3)


def test_audio_to_shards_to_training_to_speech(tmp_path):
    wav = read_wav(PROMPT)
    for i in range(6):
        write_wav(tmp_path / "audio" / f"{i}.wav", wav.roll(1600 * i))
    hubert_units.main([str(tmp_path / "audio"), f"--out={tmp_path}/units"])
    train.main(["--init=twist", f"--data={tmp_path}/units", f"--val-data={tmp_path}/units", f"--out={tmp_path}/run", "--steps=8",
                "--tokens-per-step=128", "--block-size=64", "--warmup=1", "--eval-interval=8", "--eval-rows=2"])
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2]) - 0.3  # validation loss, last against first
    sample.main([str(PROMPT), f"--model={tmp_path}/run/model", f"--out={tmp_path}", "--max-new-units=20"])
    assert (tmp_path / "prompt_0.wav").exists()


def test_units_that_are_not_collapsed_stay_so_from_audio_to_audio(tmp_path):
    """Every frame a unit: training, the prompt's units, and the speech, in which each run lasts as long as it was long."""
    write_wav(tmp_path / "audio" / "0.wav", read_wav(PROMPT))
    hubert_units.main([str(tmp_path / "audio"), f"--out={tmp_path}/units", "--no-dedup"])
    train.main(["--init=cold", f"--data={tmp_path}/units", f"--val-data={tmp_path}/units", f"--out={tmp_path}/run", "--steps=2",
                "--tokens-per-step=64", "--block-size=64", "--eval-rows=1"])
    sample.main([str(PROMPT), f"--model={tmp_path}/run/model", f"--out={tmp_path}", "--max-new-units=20", "--prompt-seconds=2"])
    frames = len(hubert_units.load_unit_encoder().encode(read_wav(PROMPT)[:2 * 16_000]))
    assert 0 < len(read_wav(tmp_path / "prompt_0.wav")) - frames * 640 <= 20 * 640
    vocoder.main([f"{tmp_path}/units", f"--out={tmp_path}/speech", "--use-durations"])
    assert len(read_wav(tmp_path / "speech/0.wav")) == 640 * len(hubert_units.load_unit_encoder().encode(read_wav(PROMPT)))
    with pytest.raises(ValueError, match="another tokenizer .dedup is False, expected True"):
        train.main(["--init=pocket", f"--data={tmp_path}/units", f"--val-data={tmp_path}/units", f"--out={tmp_path}/other"])


def test_all_commands_take_the_same_options_of_the_tokenizer():
    wanted = {field.name for field in dataclasses.fields(hubert_units.TokenizerOptions)}
    assert wanted == {"tokenizer", "kmeans", "k", "layer", "frame_rate", "pad", "chunking", "precision"}
    for command in (hubert_units.UnitsConfig, train.TrainConfig, sample.SampleConfig, evaluate.EvalConfig):
        assert wanted <= {field.name for field in dataclasses.fields(command)}
        for name in wanted:
            assert f"--{name.replace('_', '-')}=" in config.help_text(command)


def test_what_the_options_leave_open_is_as_the_model_was_trained(monkeypatch):
    options = hubert_units.TokenizerOptions()
    assert hubert_units.load_tokenizer(options).recipe["pad"] == 0
    said = {"pad": 40, "chunking": "textless", "frame_rate": 12.5, "precision": "bfloat16"}
    found = hubert_units.load_tokenizer(options, said).recipe
    assert {key: found[key] for key in said} == said
    given = dataclasses.replace(options, pad=8, chunking="overlap", frame_rate=25.0, precision="float32")
    found = hubert_units.load_tokenizer(given, said).recipe
    assert (found["pad"], found["chunking"], found["frame_rate"], found["precision"]) == (8, "overlap", 25.0, "float32")


def test_a_prompt_may_be_heard_in_another_precision_than_that_of_the_models_units():
    """A model of units that only a GPU makes so can still be sampled on a CPU, with a vocoder of units in float32."""
    recipe = {**hubert_units.load_unit_encoder().recipe, "dedup": True}
    vocabs = {name: twist.UnitVocab(200, recipe={**recipe, "precision": name}) for name in ("bfloat16", "float16")}
    assert sample.load_voice(sample.SampleConfig(), vocabs["bfloat16"])[0].precision == "bfloat16"
    with pytest.raises(ValueError, match="--precision=float16 needs a CUDA GPU.*choose --precision=float32"):
        sample.load_voice(sample.SampleConfig(), vocabs["float16"])
    assert sample.load_voice(sample.SampleConfig(precision="float32"), vocabs["float16"])[0].precision == "float32"
    with pytest.raises(ValueError, match="layer is 6, expected 5"):
        sample.load_voice(sample.SampleConfig(), dataclasses.replace(vocabs["bfloat16"], recipe={**recipe, "layer": 5}))


@pytest.mark.slow
def test_a_bad_prompt_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "text.wav").write_text("these are words")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(500), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "none").mkdir()
    names = {"missing.wav": "no audio file", "text.wav": "as audio", "empty.wav": "no samples", "short.wav": "longer recording",
             "nan.wav": "NaN", "none": "is a directory"}
    result = launch("sample.py", *[tmp_path / name for name in names], f"--out={tmp_path}/out")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == len(names), result.stderr
    for line, words in zip(lines, names.values(), strict=True):
        assert line.startswith("sample.py: error:") and words in line
    assert not (tmp_path / "out").exists()

def test_speech_that_cannot_be_written_costs_only_itself(tmp_path, capsys):
    long = tmp_path / ("a" * 250 + ".wav")
    long.write_bytes(PROMPT.read_bytes())
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(long), str(PROMPT), "--resynth", f"--out={tmp_path}/out", "--device=cpu"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("cannot write") == 1 and "File name too long" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prompt_resynth.wav"]


@pytest.mark.slow
def test_a_bad_prompt_among_good_ones_costs_only_itself(tmp_path):
    result = launch("sample.py", tmp_path / "missing.wav", PROMPT, f"--out={tmp_path}", "--max-new-units=5")
    assert result.returncode == 2 and (tmp_path / "prompt_0.wav").exists()


@pytest.mark.parametrize("argument, words", {
    "--modle=x": "did you mean --model", "--model={text}": "is no speech LM", "--model={empty}": "no config.json",
    "--tokenizer={empty}": "which is empty", "--vocoder={empty}": "no config.json", "--model=nowhere": "no such file",
    "--top-p=2": "--top-p=2.0: expected", "--num-samples=0": "--num-samples"}.items())
def test_models_and_options_that_cannot_work_are_explained(argument, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    plain = read_json(ROOT / "pocket/text_lm/config.json")
    write_model(tmp_path / "text", {key: value for key, value in plain.items() if key != "offset"},
                read_tensors(ROOT / "pocket/text_lm"))
    argument = argument.format(empty=tmp_path / "empty", text=tmp_path / "text")
    monkeypatch.setattr(sys, "argv", ["sample.py", str(PROMPT), f"--out={tmp_path}/out", argument])
    with pytest.raises(SystemExit) as stopped:
        config.command(sample.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said, said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_parts_of_different_tokenizers_do_not_mix(tmp_path):
    centers = read_tensors(ROOT / "pocket/hubert/kmeans.safetensors")["centers"]
    other = tmp_path / "hubert"
    other.mkdir()
    for path in (ROOT / "pocket/hubert").glob("[cm]*"):
        (other / path.name).symlink_to(path)
    write_tensors(other / "kmeans.safetensors", {"centers": centers.flip(0)}, {"layer": "2"})
    with pytest.raises(ValueError, match="another tokenizer"):
        sample.main([str(PROMPT), f"--tokenizer={other}", f"--out={tmp_path}"])


def test_transformers_opens_the_bundled_language_models_with_the_same_logits():
    transformers = pytest.importorskip("transformers")
    for name in ("text_lm", "speech_lm"):
        folder = ROOT / "pocket" / name
        ours = twist.load_text_lm(folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.randint(0, ours.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_transformers_opens_the_bundled_hubert_with_the_same_features():
    transformers = pytest.importorskip("transformers")
    encoder = hubert_units.load_unit_encoder()
    theirs = transformers.HubertModel.from_pretrained(ROOT / "pocket/hubert", dtype=torch.float32).eval()
    wav = read_wav(PROMPT)
    with torch.no_grad():
        states = theirs(wav[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.features(wav), states[encoder.layer][0], rtol=1e-3, atol=1e-3)


def test_the_bundle_is_small():
    sizes = [file.stat().st_size for file in (ROOT / "pocket").rglob("*") if file.is_file() and "__pycache__" not in str(file)]
    assert max(sizes) < 10e6 and sum(sizes) < 30e6


def test_the_units_of_the_bundled_prompt_are_the_ones_the_models_were_trained_with():
    units = hubert_units.load_unit_encoder().encode(read_wav(PROMPT))
    assert len(units) == len(GOLDEN)
    # another processor may sum in another order and flip a unit that lies between two centres, hardly more
    assert (units == torch.tensor(GOLDEN)).float().mean() > 0.98


# ---------------------------------------------------------------------------------------------- published names

UNITS = 20  # the published tokenizer has 500
TWIST_SHAPE = TransformerConfig(vocab_size=UNITS + 3, block_size=128, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, head_dim=8,
                                n_inner=64, norm_order="post", embed_dim=16, init_std=0.3)  # as OPT-350M
SLAM_SHAPE = dataclasses.replace(TWIST_SHAPE, norm="rmsnorm", norm_order="pre", embed_dim=32, position="rope", mlp="swiglu",
                                 out_bias=False, mlp_bias=False, n_kv_head=2, family="qwen2")  # as Qwen2.5


def publish_speech_parts(root):
    """A small 25 Hz HuBERT, its k-means and its vocoder, in the formats and under the names of the published ones."""
    joblib, cluster = pytest.importorskip("joblib"), pytest.importorskip("sklearn.cluster")
    folder = root / known.SPEECH
    folder.mkdir(parents=True)
    config = dataclasses.replace(SLOW, n_layer=12)
    network = hubert.Hubert(config)
    perturb(network.state_dict())
    _, theirs = pretrained.write_hubert(dataclasses.asdict(config), network.state_dict())
    cfg = {"model": {"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 3", "encoder_attention_heads": 4,
                     "conv_pos_batch_norm": True}, "task": {"normalize": False, "sample_rate": 16000}}
    torch.save({"args": None, "cfg": cfg, "model": fairseq_names(theirs)}, root / f"{known.MHUBERT}.pt")
    features = network.eval()(noise(200_000)[None], 11)[0].detach()
    kmeans = cluster.KMeans(UNITS, n_init=1, random_state=0).fit(features.numpy())
    joblib.dump(kmeans, root / f"{known.MHUBERT}_L11_km500.bin")
    duration = DurationConfig(8, 6, 3, 0.5)
    options = VocoderConfig(upsample_rates=(5, 4, 4, 4, 2), upsample_kernel_sizes=(11, 8, 8, 8, 4), upsample_initial_channel=32,
                            resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),), num_embeddings=UNITS, embedding_dim=8,
                            model_in_dim=8, code_hop_size=640, dur_predictor_params=duration)
    torch.save({"generator": Vocoder(options).state_dict()}, root / f"{known.HIFIGAN}.pt")
    (root / f"{known.HIFIGAN}_config.json").write_text(json.dumps({**dataclasses.asdict(options), "f0": False}))


def publish_language_models(root):
    """TWIST-350M.zip as Meta's, slprl/slam and facebook/opt-125m as the hub's."""
    meta, slam = twist.UnitVocab(UNITS, 3, None, None, None), twist.UnitVocab(UNITS)
    folder = root / "zip" / "TWIST-350M"
    twist.save_speech_lm(twist.cold_start(TWIST_SHAPE, meta), meta, folder)
    settings = read_json(folder / "config.json")
    for key in ("num_units", "tokenizer_recipe"):
        del settings[key]
    write_json(folder / "config.json", {**settings, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1})
    torch.save({name: tensor.half() for name, tensor in read_tensors(folder).items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (root / "textless_nlp/twist/lms").mkdir(parents=True)
    shutil.make_archive(root / "textless_nlp/twist/lms/TWIST-350M", "zip", root / "zip")

    folder = root / "slprl/slam/resolve/main"
    twist.save_speech_lm(twist.cold_start(SLAM_SHAPE, slam), slam, folder)
    inner = read_json(folder / "config.json")
    write_json(folder / "config.json", {"model_type": "speech_language_model", "vocab_size": UNITS + 2,
                                        "base_config": {**inner, "vocab_size": 151936}})
    write_tensors(folder / "model.safetensors",
                  {f"lm.{name}": tensor for name, tensor in read_tensors(folder).items()})

    folder = root / "facebook/opt-125m/resolve/main"
    opt = dataclasses.replace(TWIST_SHAPE, norm_order="pre", embed_dim=32)
    twist.save_speech_lm(twist.cold_start(opt, twist.UnitVocab(300)), twist.UnitVocab(300), folder)
    torch.save({name.removeprefix("model."): tensor.half() for name, tensor in read_tensors(folder).items()},
               folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server that stands for all hosts, with small models in published formats; returns the paths that were asked for."""
    root, asked = tmp_path / "server", []
    publish_speech_parts(root)
    publish_language_models(root)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for variable in ("NANOTWIST_MIRROR", "HF_ENDPOINT"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for names in download.KNOWN.values():  # the hashes of the small files in place of the published ones
        for name, entry in names.items():
            files = [file._replace(sha256=hashlib.sha256((root / file.url).read_bytes()).hexdigest())
                     if file.sha256 and (root / file.url).is_file() else file for file in entry.files]
            monkeypatch.setitem(names, name, entry._replace(files=files))
    yield asked
    server.shutdown()
    server.server_close()


def test_published_models_are_fetched_by_name_once_and_continue_a_prompt(published, tmp_path, monkeypatch):
    names = ["--tokenizer=mhubert-base-25hz", "--vocoder=mhubert-base-25hz"]
    for model in ("TWIST-350M", "slprl/slam"):
        sample.main([str(PROMPT), f"--model={model}", *names, f"--out={tmp_path / model}", "--max-new-units=12"])
    assert any("TWIST-350M.zip" in path for path in published) and any("/slprl/slam/" in path for path in published)
    assert hubert_units.load_unit_encoder("mhubert-base-25hz").layer == 11
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = len(published)
    for model in ("TWIST-350M", "slprl/slam"):
        sample.main([str(PROMPT), f"--model={model}", *names, f"--out={tmp_path / 'again' / model}", "--max-new-units=12"])
        wav = (tmp_path / model / "prompt_0.wav").read_bytes()
        assert wav == (tmp_path / "again" / model / "prompt_0.wav").read_bytes() and len(wav) > 3 * 2 * 16000
    assert len(published) == fetched
    vocab = twist.load_speech_lm("TWIST-350M")[1]
    assert (vocab.offset, vocab.bos, vocab.eos, vocab.num_units) == (3, None, 2, UNITS)
    assert twist.load_speech_lm("slprl/slam")[1] == twist.UnitVocab(UNITS, recipe={"pad": 40})
    assert load_vocoder("mhubert-base-25hz-kmeans-500-hifigan").config.code_hop_size == 640


def test_a_text_lm_of_the_hub_is_warm_started_by_name(published, tmp_path, capsys):
    twist.main(["--lm=facebook/opt-125m", "--units=20", f"--out={tmp_path / 'warm'}"])
    assert "(302, 32)" in capsys.readouterr().out and twist.load_speech_lm(tmp_path / "warm")[1] == twist.UnitVocab(20)
    wanted = [path for path in published if "opt-125m" in path]
    assert wanted[-1].endswith("pytorch_model.bin") and any(path.endswith("model.safetensors") for path in wanted)
    with pytest.raises(FileNotFoundError, match="--lm=facebook/opt-999: no such file or folder.*opt-999"):
        twist.load_text_lm("facebook/opt-999")
    with pytest.raises(FileNotFoundError, match="--tokenizer=mhubert: .*mhubert-base-25hz"):
        hubert_units.load_unit_encoder("mhubert")
    with pytest.raises(FileNotFoundError, match="--kmeans=km: .*hubert-base-ls960-kmeans-100"):
        hubert_units.load_unit_encoder("mhubert-base-25hz", kmeans="km")


def test_a_tokenizer_in_hugging_face_form_takes_a_published_k_means(published, tmp_path):
    network = hubert.Hubert(dataclasses.replace(BASE, n_layer=12))
    perturb(network.state_dict())
    settings, tensors = pretrained.write_hubert(dataclasses.asdict(network.config), network.state_dict())
    write_model(tmp_path / "hubert", settings, tensors)
    encoder = hubert_units.load_unit_encoder(tmp_path / "hubert", kmeans="mhubert-base-25hz-kmeans-500")
    assert (encoder.layer, encoder.num_units) == (11, UNITS)
    with pytest.raises(FileNotFoundError, match="--kmeans, or one of mhubert-base-25hz-kmeans-500"):
        hubert_units.load_unit_encoder(tmp_path / "hubert")
