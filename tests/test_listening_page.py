"""The listening page: what it shows is what was spoken, it fetches nothing, and names of files do no harm."""
import base64
import dataclasses
import io
import itertools
import math
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch

import eval as evaluate
import sample
import twist
import vocoder
from corpus.shards import write_shards
from evaluation.likelihood import log_probabilities, surprisal
from hubert_units import load_unit_encoder, speech_to_units
from pages import clips, html, listening
from speech.audio import read_wav
from training.distributed import Dist

PROMPT = Path(__file__).parent.parent / "pocket/prompt.wav"
UGLY = "<script>alert(1)<!--\"><img src=x onerror=alert(1)>'&amp;#.wav"


TITLE = re.compile(r"unit (\d+), ([\d.]+) s, (\d+) ms(?:, ([\d.]+) bits)?(, prompt)?$")


class Elements(HTMLParser):
    """All elements of a page: [(name, attributes)], and the text inside each kind."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag, key=None):
        return [attributes.get(key) if key else attributes for name, attributes in self.found if name == tag]


def addresses(elements):
    return [value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href") and value]


def titles_of(page):
    return [text for text in page.texts["title"] if text.startswith("unit ")]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A folder with two continuations, and its page."""
    out = tmp_path_factory.mktemp("sampled")
    sample.main([str(PROMPT), f"--out={out}", "--num-samples=2", "--max-new-units=30", "--page"])
    return out, Elements((out / "index.html").read_text())


def test_each_clip_is_played_and_drawn(sampled):
    out, page = sampled
    sources = page.all("audio", "src")
    assert sources == ["prompt_original.wav", "prompt_respoken.wav", "prompt_0.wav", "prompt_1.wav"]
    assert torch.equal(read_wav(out / sources[0]), read_wav(PROMPT)[:48000])
    labels = page.all("audio", "aria-label")
    assert all(str(PROMPT) in label for label in labels) and len(set(labels)) == 4 and page.all("audio", "controls") == [None] * 4
    for svg, source in zip(page.all("svg"), sources):
        assert abs(int(svg["width"]) / clips.PIXELS - len(read_wav(out / source)) / 16000) < 0.01


def test_boxes_are_the_units_in_their_lengths_and_know_what_they_cost(sampled):
    out, page = sampled
    units, runs = speech_to_units(PROMPT, load_unit_encoder("pocket"), 3.0)
    titles = [TITLE.match(title) for title in titles_of(page)]
    starts = [i for i, title in enumerate(titles) if title[2] == "0.00"]
    parts = [titles[a:b] for a, b in zip(starts, [*starts[1:], len(titles)])]
    assert [[int(title[1]) for title in part[:len(units)]] for part in parts] == [units.tolist()] * 4
    milliseconds = np.array([int(title[3]) for title in parts[0]])
    np.testing.assert_array_equal(milliseconds, runs * (1000 / load_unit_encoder("pocket").frame_rate))
    slm, vocab = twist.load_speech_lm("pocket")
    for part in parts[2:]:
        said = torch.tensor([int(title[1]) for title in part])
        scores = log_probabilities(slm, [vocab.encode(said, bos=True)], Dist(0, 1, torch.device("cpu")))[0]
        bits = [float(title[4]) for title in part]
        np.testing.assert_allclose(bits, -np.asarray(scores) / math.log(2), atol=0.06)
        assert [title[5] is not None for title in part] == [i < len(units) for i in range(len(part))]


def test_a_model_of_frames_pays_for_a_unit_in_all_of_its_frames():
    slm, vocab = twist.load_speech_lm("pocket")
    units, runs = torch.tensor([3, 7, 3]), torch.tensor([2, 1, 3])
    frames = torch.tensor([3, 3, 7, 3, 3, 3])
    each = surprisal(slm, vocab, frames, torch.ones(6))
    vocab = dataclasses.replace(vocab, recipe={**vocab.recipe, "dedup": False})
    torch.testing.assert_close(surprisal(slm, vocab, units, runs),
                               torch.stack([each[:2].sum(), each[2], each[3:].sum()]))


def test_the_page_asks_for_nothing_but_files_beside_it(sampled, tmp_path):
    out, page = sampled
    sample.main([str(PROMPT), f"--out={tmp_path}", "--max-new-units=10", "--page=inline"])
    inline = Elements((tmp_path / "index.html").read_text())
    assert all(address.startswith("data:") for address in addresses(inline)) and len(addresses(inline)) == 6
    for address in addresses(page):
        assert address.startswith("data:") or (out / unquote(address)).is_file()
    for found in (page, inline):
        policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
        assert policy.startswith("default-src 'none'") and "http" not in policy and "unsafe-eval" not in policy
    sound = base64.b64decode(addresses(inline)[4].partition(",")[2])  # audio and picture in turn
    assert np.array_equal(soundfile.read(io.BytesIO(sound), dtype="int16")[0],
                          soundfile.read(tmp_path / "prompt_0.wav", dtype="int16")[0])


def test_names_of_files_do_no_harm(tmp_path):
    shutil.copy(PROMPT, tmp_path / UGLY)
    with pytest.raises(SystemExit):  # one of them does not exist
        sample.main([str(tmp_path / UGLY), str(tmp_path / "no.wav"), f"--out={tmp_path / 'out'}", "--max-new-units=10", "--page"])
    page = Elements((tmp_path / "out/index.html").read_text())
    assert not page.all("img") and [*page.all("script")] == [{"type": "application/json", "id": "data"}, {}]
    assert str(tmp_path / UGLY) in page.texts["h2"] and any("no.wav" in text for text in page.texts["li"])
    assert all((tmp_path / "out" / unquote(source)).is_file() for source in page.all("audio", "src"))
    assert "onerror" not in "".join(key for _, attributes in page.found for key in attributes)
    data = html.document("a", "", "listening", {"name": "</script><script>alert(1)"})
    assert len(Elements(data).all("script")) == 2


def test_bytes_that_are_no_text_are_shown_as_such():
    assert html.escape("a\udcffb<") == "a\\udcffb&lt;"
    assert html.address("x/a\udcff b.wav", "x") == "a%FF%20b.wav"


def test_another_page_is_kept_and_the_same_one_is_not_doubled(tmp_path):
    arguments = [str(PROMPT), f"--out={tmp_path}", "--max-new-units=10", "--page"]
    for more in ([], [], ["--seed=1"]):
        sample.main([*arguments, *more])
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["index-1.html", "index.html"]
    kept = Elements((tmp_path / "index-1.html").read_text())
    assert {*kept.all("audio", "src")} == {"prompt_original.wav", "prompt_respoken.wav", "prompt_0.wav"}
    new = Elements((tmp_path / "index.html").read_text())
    assert {*new.all("audio", "src")} == {"prompt_original-2.wav", "prompt_respoken-2.wav", "prompt_0-2.wav"}


@pytest.mark.slow
def test_of_a_prompt_beyond_the_window_its_end_is_played(tmp_path):
    wav = read_wav(PROMPT).repeat(12)
    soundfile.write(tmp_path / "long.wav", wav.numpy(), 16000)
    sample.main([str(tmp_path / "long.wav"), f"--out={tmp_path}", "--max-new-units=20", "--prompt-seconds=0", "--page"])
    original, again = (read_wav(tmp_path / f"long_{kind}.wav") for kind in ("original", "respoken"))
    assert len(original) == len(again) < len(wav) and torch.equal(original, read_wav(tmp_path / "long.wav")[-len(original):])


def test_the_vocoder_shows_what_it_spoke(tmp_path):
    runs = np.array([3, 1, 2])
    write_shards(tmp_path / "units", vocoder.load_vocoder().recipe, [("a.wav", np.array([5, 9, 5]), runs, 0.24)])
    vocoder.main([str(tmp_path / "units"), f"--out={tmp_path / 'out'}", "--use-durations", "--page"])
    page = Elements((tmp_path / "out/index.html").read_text())
    hop = len(read_wav(tmp_path / "out/a.wav")) / runs.sum() / 16
    starts = itertools.accumulate([0, *runs[:-1]])
    assert titles_of(page) == [f"unit {unit}, {start * hop / 1000:.2f} s, {run * hop:.0f} ms"
                               for unit, run, start in zip([5, 9, 5], runs, starts)]


def test_what_is_too_much_for_a_page_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "MOST", 2)
    page = listening.Page(tmp_path, "inline")
    for i in range(5):
        page.add(f"prompt {i}", [("speech", torch.zeros(1600))])
    found = Elements(page.write("five").read_text())
    assert len(found.all("section")) == 2 and "3 more are not shown" in found.texts["li"]


def test_a_long_clip_is_drawn_up_to_a_minute(tmp_path):
    clip = clips.Clip("speech", torch.zeros(61 * 16000), None, torch.zeros(62), torch.ones(62))
    found = Elements(clips.figure(clip, tmp_path, "prompt"))
    assert found.all("svg", "width") == ["6000"] and len(found.all("rect")) == 60
    assert "first 60 s drawn" in "".join(found.texts["small"])


def test_the_spectrogram_is_that_of_float64_arithmetic():
    wav = torch.sin(2 * torch.pi * 1000 * torch.arange(4800) / 16000)
    wav += 0.01 * torch.randn(4800, generator=torch.Generator().manual_seed(0))
    found = clips.mel(wav).numpy()
    padded = np.pad(wav.double().numpy(), clips.WINDOW // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(clips.WINDOW) / clips.WINDOW)
    scale = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    ends = np.linspace(0, scale(8000), clips.BANDS + 2)
    bins = np.linspace(0, 8000, clips.WINDOW // 2 + 1)
    edges = 700 * (10 ** (ends / 2595) - 1)
    for frame in (0, 7, 15):
        power = np.abs(np.fft.rfft(padded[frame * clips.HOP:][:clips.WINDOW] * window)) ** 2
        bands = [sum(p * np.interp(b, edges[i:i + 3], [0, 1, 0]) for p, b in zip(power, bins)) for i in range(clips.BANDS)]
        np.testing.assert_allclose(found[:, frame], np.log10(np.array(bands) + 1e-10), atol=2e-3)
    assert abs(edges[1:-1][found[:, 7].argmax()] - 1000) < 60


def test_a_picture_can_be_read_back():
    pixels, palette = torch.arange(12, dtype=torch.uint8).reshape(3, 4), torch.arange(36, dtype=torch.uint8).reshape(12, 3)
    content, found, at = html.png(pixels, palette), {}, 8
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at:at + 8])
        body = content[at + 8:at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body)
        found[kind], at = body, at + 12 + size
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(3, 5)
    assert struct.unpack(">II", found[b"IHDR"][:8]) == (4, 3) and not rows[:, 0].any()
    assert np.array_equal(rows[:, 1:], pixels) and found[b"PLTE"] == palette.numpy().tobytes() and b"IEND" in found


def test_an_evaluation_shows_both_models_beside_what_follows(tmp_path):
    evaluate.main(["--task=generation", "--prompts=2", "--max-new-units=12", "--versus=pocket", f"--out={tmp_path}", "--page"])
    page = Elements((tmp_path / "index.html").read_text())
    assert len(page.all("section")) == 2
    assert page.all("audio", "src")[:3] == [f"spoken/{system}/story_20000000_val0.wav"
                                            for system in ("model", "versus", "held-out_speech")]
    assert all((tmp_path / source).is_file() for source in page.all("audio", "src")) and len(page.all("path", "d")) == 6
