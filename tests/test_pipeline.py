"""From wav to wav with the bundled pocket world, and what happens to inputs that cannot work."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import checkpoint
import hubert_units
import sample
import train
import twist
from audio import read_wav, write_wav

ROOT = Path(checkpoint.__file__).parent
PROMPT = ROOT / "pocket/prompt.wav"
GOLDEN = [  # frame units of the bundled prompt, in order of time
    40, 29, 66, 14, 54, 55, 17, 95, 53, 79, 15, 9, 28, 53, 55, 61, 53, 11, 29, 18, 18, 78, 27, 63, 93, 11, 23, 23, 22, 44,
    89, 89, 84, 48, 2, 96, 17, 38, 39, 53, 83, 59, 8, 10, 41, 82, 19, 52, 15, 58, 50, 5, 11, 23, 23, 34, 92, 37, 98, 68, 88,
    56, 29, 76, 22, 78, 16, 93, 72, 29, 90, 44, 53, 83, 13, 60, 36, 78, 55, 56, 23, 66, 35, 79, 53, 83, 87, 59, 77, 41, 68,
    52, 36, 6, 83, 13, 60, 36, 77, 29, 66, 14, 54, 16, 17, 95, 95, 67, 48, 96, 96, 86, 45, 3, 3, 71, 17, 52, 15, 9, 87, 25,
    95, 35, 49, 84, 55, 61, 66, 81, 46, 62, 58, 81, 28, 50, 6, 97, 59, 38, 39, 39, 51, 51, 24,
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


def test_any_format_rate_and_channel_count_will_do_as_a_prompt(tmp_path):
    wav = read_wav(PROMPT).numpy()
    stereo = np.repeat(np.stack([wav, wav], axis=1), 3, axis=0)
    soundfile.write(tmp_path / "loud.flac", stereo, 48000)
    sample.main([str(tmp_path / "loud.flac"), f"--out={tmp_path}", "--max-new-units=10"])
    assert (tmp_path / "loud_0.wav").exists()


def test_resynthesis_needs_no_language_model(tmp_path):
    sample.main([str(PROMPT), f"--out={tmp_path}", "--resynth", "--model=nowhere"])
    assert len(read_wav(tmp_path / "prompt_resynth.wav")) == pytest.approx(len(read_wav(PROMPT)), rel=0.3)


def test_audio_to_shards_to_training_to_speech(tmp_path):
    wav = read_wav(PROMPT)
    for i in range(6):
        write_wav(tmp_path / "audio" / f"{i}.wav", wav.roll(1600 * i))
    hubert_units.main([str(tmp_path / "audio"), f"--out={tmp_path}/units"])
    train.main(["--init=twist", f"--data={tmp_path}/units", f"--val-data={tmp_path}/units", f"--out={tmp_path}/run", "--steps=8",
                "--units-per-step=128", "--block-size=64", "--warmup=1", "--eval-interval=8", "--eval-rows=2"])
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[2]) < float(rows[1].split(",")[2]) - 0.3  # validation loss, last against first
    sample.main([str(PROMPT), f"--model={tmp_path}/run/model", f"--out={tmp_path}", "--max-new-units=20"])
    assert (tmp_path / "prompt_0.wav").exists()


def test_a_bad_prompt_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "text.wav").write_text("these are words")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(500), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    names = {"missing.wav": "no audio file", "text.wav": "as audio", "empty.wav": "no samples", "short.wav": "longer recording",
             "nan.wav": "NaN", "": "is a directory"}
    result = launch("sample.py", *[tmp_path / name for name in names], f"--out={tmp_path}/out")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == len(names), result.stderr
    for line, words in zip(lines, names.values(), strict=True):
        assert line.startswith("sample.py: error:") and words in line
    assert not (tmp_path / "out").exists()


def test_a_bad_prompt_among_good_ones_costs_only_itself(tmp_path):
    result = launch("sample.py", tmp_path / "missing.wav", PROMPT, f"--out={tmp_path}", "--max-new-units=5")
    assert result.returncode == 2 and (tmp_path / "prompt_0.wav").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--modle=x"], "did you mean --model"), (["--model={empty}"], "no config.json"), (["--tokenizer={empty}"], "kmeans"),
    (["--vocoder={empty}"], "no config.json"), (["--model={text}"], "is no speech LM"), (["--model=nowhere"], "no such file"),
    (["--top-p=2"], "top_p"), (["--num-samples=0"], "--num-samples")])
def test_models_and_options_that_cannot_work_are_explained(arguments, words, tmp_path):
    (tmp_path / "empty").mkdir()
    plain = checkpoint.read_json(ROOT / "pocket/text_lm/config.json")
    checkpoint.write_model(tmp_path / "text", {key: value for key, value in plain.items() if key != "offset"},
                           checkpoint.read_tensors(ROOT / "pocket/text_lm"))
    arguments = [argument.format(empty=tmp_path / "empty", text=tmp_path / "text") for argument in arguments]
    result = launch("sample.py", PROMPT, f"--out={tmp_path}/out", *arguments)
    assert result.returncode == 2 and words in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_parts_of_different_tokenizers_do_not_mix(tmp_path):
    centers = checkpoint.read_tensors(ROOT / "pocket/hubert/kmeans.safetensors")["centers"]
    other = tmp_path / "hubert"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).symlink_to(ROOT / "pocket/hubert" / name)
    checkpoint.write_tensors(other / "kmeans.safetensors", {"centers": centers.flip(0)}, {"layer": "2"})
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
