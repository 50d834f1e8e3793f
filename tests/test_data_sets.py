"""Public data sets in miniature, encoded by the lines of docs/units.md; which recordings are kept and held out (selection.py)."""
import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import config
import hubert_units
from bench.listing import made_up
from corpus import extract, listing, selection
from corpus.shards import UnitShards
from speech.audio import SAMPLE_RATE, read_wav

ROOT = Path(hubert_units.__file__).parent
PAGE = (ROOT / "docs/units.md").read_text()
SECTION = re.search(r"^## From a public data set to units\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
LINES, EXPORT, LANGUAGES = re.findall(r"^```\w+\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
OUT = 45  # a reader's number that seed 0 holds out of a share of .01, with 304, 440, 598
SOUND = {".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None), ".wav": ("WAV", "PCM_16"),
         ".flac": ("FLAC", "PCM_16")}


def encoded(ending, seconds=0.5, start=0.0):
    """Bytes of a piece of pocket/prompt.wav, which is gone through again and again, in the format of an ending."""
    wav, (kind, subtype) = read_wav(ROOT / "pocket/prompt.wav").numpy(), SOUND[ending]
    piece = np.resize(np.roll(wav, -round(start * SAMPLE_RATE)), round(seconds * SAMPLE_RATE))
    file = io.BytesIO()
    soundfile.write(file, piece, SAMPLE_RATE, format=kind, subtype=subtype)
    return file.getvalue()


def make(names, **options):
    """Files of a data set: recordings by their endings, all else as text."""
    for number, name in enumerate(names):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(path.suffix, start=0.1 * number, **options) if path.suffix in SOUND and path.name[0] != "."
                         else b"a text\n")
    return names


@pytest.fixture(scope="module")
def encoder():
    return hubert_units.load_unit_encoder()


@pytest.fixture
def here(tmp_path, monkeypatch, encoder):
    """An empty working folder; the tokenizer is loaded once for all."""
    monkeypatch.setattr(hubert_units, "load_unit_encoder", lambda *_: encoder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encode(*words):
    hubert_units.main([*map(str, words), "--device=cpu"])


def names(folder):
    return UnitShards(folder).names if Path(folder, "meta.json").exists() else []


def sides(folder):
    return set(names(f"{folder}/train")), set(names(f"{folder}/val"))


# ---------------------------------------------------------------------------------------------- the lines of the page

LIBRI = [f"LibriSpeech/train-clean-100/{reader}/{chapter}/{reader}-{chapter}-000{i}.flac"
         for reader, chapter in ((OUT, 1), (OUT, 2), (84, 1), (1034, 5)) for i in (0, 1)]
LIGHT = [f"small/{reader}/{book}/0{i}_{book}_64kb.flac"
         for reader, book in ((OUT, "sea"), (84, "war"), (84, "sea")) for i in (1, 2)]
MLS = [f"mls_english_opus/train/audio/{reader}/{book}/{reader}_{book}_00000{i}.opus"
       for reader, book in ((84, 10), (OUT, 10), (OUT, 77)) for i in (0, 1)]
SITTINGS = [f"unlabelled_data/en/{day[:4]}/{day}-0900-PLENARY_en_{i}.ogg" for day in ("20190114", "20200708", "20200620")
            for i in (0, 1)]
SPOKEN = [f"transcribed_data/en/2019/20190114-0900-PLENARY-en_20190114-{i}.ogg" for i in (1, 2, 3)]
PIECES = [f"peoples_speech/{source}/{source}_0000{i}.flac" for source in ("town_hall_63_DOT_mp3", "town_hall_1_DOT_mp3")
          for i in (0, 1)]
SHOWS = [f"podcasts/{show}/{episode}.mp3" for show in ("show_105", "show_1", "show 2") for episode in ("one", "two")]
STORIES = [f"{kind}SC/{i}_{story}_{name}.wav" for kind in "ts" for i, story, name in
           ((0, "a1", "correct"), (1, "a1", "incorrect"), (2, "b2", "correct"), (3, "b2", "incorrect"))]
SETS = {  # --out -> recordings, those of them that are held out, what else lies there, and how it is counted
    "librispeech": (LIBRI, LIBRI[:4], ["LibriSpeech/train-clean-100/84/1/84-1.trans.txt", "LibriSpeech/SPEAKERS.TXT",
                                       "LibriSpeech/train-clean-100/84/1/._84-1-0000.flac"], "1 .txt"),
    "librilight": (LIGHT, LIGHT[:2], ["small/84/war/01_war_64kb.json", f"small/{OUT}/sea/01_sea_64kb.json"], "2 .json"),
    "mls": (MLS, MLS[2:], ["mls_english_opus/train/transcripts.txt", "mls_english_opus/train/segments.txt"], "2 .txt"),
    "voxpopuli": (SITTINGS, SITTINGS[2:4], ["unlabelled_data/unlabelled_v2.tsv.gz"], ""),
    "voxpopuli_asr": (SPOKEN, SPOKEN[1:2], [], "1 .gz, 2 .tsv"),
    "peoples_speech": (PIECES, PIECES[:2], [], ""),
    "podcasts": (SHOWS, SHOWS[:2], ["podcasts/show_1/cover.jpg", "podcasts/show_1/three.m4a"],
                 "1 .jpg, 1 .m4a; libsndfile does not"),
    "stories": (STORIES, [], [], "")}


def manifest(*rows):
    """A table of VoxPopuli, as its get_asr_data.py writes it."""
    head = ("id", "raw_text", "normalized_text", "speaker_id", "split", "gender")
    return "".join("\t".join(row) + "\n" for row in (head, *rows))


@pytest.mark.parametrize("out", SETS)
def test_each_data_set_is_encoded_by_the_line_of_the_page(out, here, capsys):
    recordings, held_out, others, passed = SETS[out]
    make(recordings)
    make(others)
    if out == "voxpopuli_asr":
        one, two, three = (Path(name).stem for name in SPOKEN)
        Path("transcribed_data/en/asr_train.tsv").write_text(manifest((one, "A", "a", "28308", "train", "f"),
                                                                      (two, "B", "b", "107", "train", "m")))
        Path("transcribed_data/en/asr_dev.tsv").write_text(manifest((three, "C", "c", "None", "dev", "m")))
        make(["transcribed_data/en/asr_en.tsv.gz"])
    ran = 0
    for before, line in zip(["", *LINES.splitlines()], LINES.splitlines()):
        if f"--out=units/{out} " in line + " ":
            if not before.startswith("python"):
                subprocess.run(before, shell=True, check=True)
            capsys.readouterr()
            encode(*shlex.split(line, comments=True)[2:])
            ran += 1
    assert ran == 1
    said = capsys.readouterr()
    assert (f"passed over: {passed}" in said.err) if passed else "passed over" not in said.err
    if held_out:
        assert sides(f"units/{out}") == (set(recordings) - set(held_out), set(held_out))
        assert f"{len(held_out)} of {len(recordings)} recordings" in said.out
        assert not [path for path in Path("units", out).iterdir() if path.name not in ("train", "val")]
    else:
        assert set(names(f"units/{out}")) == set(recordings)
    assert " 0 failures" in said.out


def test_the_units_that_the_page_expects_are_hours_times_rate():
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in SECTION.splitlines() if line.startswith("|")]
    counted = [[float(cell.replace(",", "")) for cell in row[2:]] for row in rows
               if len(row) == 5 and all(re.fullmatch(r"[\d,.]+", cell) for cell in row[2:])]
    assert len(counted) == 9
    for hours, rate, millions in counted:
        assert millions == pytest.approx(hours * 3600 * rate / 1e6, rel=2e-3)
    assert float(re.search(r"hours x ([\d.]+)", SECTION)[1]) == pytest.approx(19.4 * 3600 / 1e6, rel=1e-3)


@pytest.mark.slow
def test_a_long_episode_is_read_in_pieces_and_stays_one_document(here, monkeypatch):
    monkeypatch.setattr(extract, "HELD_SECONDS", 60)
    whole = []
    monkeypatch.setattr(extract.audio, "read_wav", lambda file: whole.append(file) or read_wav(file))
    make(["podcasts/show_1/long.mp3"], seconds=75)
    make(["podcasts/show_105/short.mp3"])
    encode("podcasts", "--out=u", "--hold-out=0.01", "--by=folder")
    shards = UnitShards("u/train")
    assert shards.names == ["podcasts/show_1/long.mp3"] and whole == ["podcasts/show_105/short.mp3"]
    assert shards.document(0)[1].sum() == pytest.approx(75 * 25, abs=3)


def test_the_export_and_the_language_lines_make_what_the_other_lines_take(here):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = ["court/court_DOT_mp3_00000.flac", "town_hall_63_DOT_mp3_00001.flac", "../up_00000.flac", "forum_DOT_mp3_00002.flac"]
    texts = ["this is what the committee said about the budget yesterday", "we will now come to order and hear from the mayor",
             "le petit garçon est allé à la maison avec sa mère", "el perro corre por la calle y no quiere volver a casa"]
    Path("clean").mkdir()
    table = pyarrow.table({"id": ids, "audio": [{"bytes": encoded(".flac"), "path": name} for name in ids], "text": texts})
    parquet.write_table(table, "clean/train-00000-of-00001.parquet")
    exec(compile(EXPORT, "docs/units.md", "exec"), {})
    found = sorted(str(path) for path in Path("peoples_speech").rglob("*.flac"))
    assert len(found) == 4 and "peoples_speech/town_hall_63_DOT_mp3/town_hall_63_DOT_mp3_00001.flac" in found
    assert not list(here.parent.glob("*.flac")) and not list(here.glob("*.flac"))
    pytest.importorskip("py3langid")
    exec(compile(LANGUAGES, "docs/units.md", "exec"), {})
    encode("peoples_speech", "--out=u", "--keep=english.txt")
    assert {Path(name).name for name in names("u")} == {"court_SLASH_court_DOT_mp3_00000.flac", "town_hall_63_DOT_mp3_00001.flac"}


# ---------------------------------------------------------------------------------------------- held out

def test_who_is_held_out_never_changes():
    """A rule that came out differently one day would put speakers of older validation sets into training."""
    assert [number for number in range(1, 1000) if selection.drawn(str(number), 0) < 0.01] == [45, 304, 440, 598, 690, 797, 999]
    assert [number for number in range(1, 1000) if selection.drawn(str(number), 1) < 0.01] == [25, 355, 767, 781]
    assert selection.drawn("z\udcff", 3) == pytest.approx(0.8742396756934201, abs=1e-15)
    digest = hashlib.blake2b(b"7\x0084", digest_size=8).hexdigest()
    assert selection.drawn("84", 7) == int(digest, 16) / 2**64


def test_a_share_is_a_share():
    """Of 20,000 groups the share of those held out lies within four standard errors."""
    for share in (0.01, 0.3, 0.9):
        held = np.mean([selection.drawn(f"speaker {i}", 5) < share for i in range(20_000)])
        assert abs(held - share) < 4 * (share * (1 - share) / 20_000)**0.5


def options(*words):
    return config.load(hubert_units.UnitsConfig, [*map(str, words)], positional="audio")


def divided(*words):
    return [{*some} for some in selection.divide(options(*words)).values()]


def empty_files(*paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_split_stays_when_recordings_are_added_moved_or_named_otherwise(here, monkeypatch, capsys):
    first = [f"set/{reader}/{book}/a.flac" for reader in range(0, 60) for book in (1, 2)]
    empty_files(*first)
    train, val = divided("set", "--out=u", "--hold-out=0.2")
    assert train | val == set(first) and 0 < len(val) < len(train)
    assert not {Path(name).parts[1] for name in train} & {Path(name).parts[1] for name in val}
    readers = {Path(name).parts[1] for name in val}
    assert f"held out: {len(readers)} of 60 speakers ({', '.join(sorted(readers)[:3])}, ...), " in capsys.readouterr().out
    more = [f"set/{reader}/3/b.flac" for reader in range(40, 90)]
    empty_files(*more)
    bigger, held = divided("set", "--out=u", "--hold-out=0.2", "--by=speaker")
    assert train < bigger and val < held and bigger | held == {*first, *more}
    wider = divided("set", "--out=u", "--hold-out=0.4")[1]
    assert held < wider and divided("set", "--out=u", "--hold-out=0.2", "--seed=1")[1] not in (held, wider)
    os.rename("set", "other")
    monkeypatch.chdir(here / "other")
    assert divided(".", "--out=../u", "--hold-out=0.2")[1] == {name.removeprefix("set/") for name in held}
    monkeypatch.chdir(here / "other/45")
    assert divided("1/a.flac", here / "other", "--out=../../u", "--hold-out=0.2")[1] == (
        {"1/a.flac", *(f"{here}/other/{name.removeprefix('set/')}" for name in held)} - {f"{here}/other/45/1/a.flac"})


def test_folders_and_files_are_held_out_whole(here):
    paths = [f"{top}/show {i}/{episode}.{ending}" for top in "ab" for i in range(30) for episode in ("x", "y") for ending in
             ("mp3", "wav")]
    empty_files(*paths)
    for by, parts in (("folder", slice(1, 2)), ("file", slice(1, 3))):
        train, val = ({tuple(Path(name).with_suffix("").parts[parts]) for name in side}
                      for side in divided("a", "b", "--out=u", "--hold-out=0.3", f"--by={by}"))
        assert train and val and not train & val and len(train | val) == (30 if by == "folder" else 60)


@pytest.mark.parametrize("path", ["podcasts/show/a.mp3", "unlabelled_data/en/2019/x_en_0.ogg", "id10270/5r0/a.wav", "a.wav"])
def test_a_speaker_who_is_not_known_is_an_error_that_says_so(path, here):
    empty_files(path)
    with pytest.raises(ValueError, match=f"the speaker of {path} is not known.*--by=folder and --by=file"):
        divided(path, "--out=u", "--hold-out=0.5")
    assert not Path("u").exists()


def test_a_list_holds_out_recordings_or_speakers(here, capsys):
    paths = [f"set/{reader}/{book}/{reader}-{book}-{i}.flac" for reader in (1, 2, 3) for book in (7, 8) for i in (0, 1)]
    empty_files(*paths)
    Path("n.txt").write_text("1-7-0\n")
    assert divided("set", "--out=u", "--hold-out=n.txt") == [set(paths[1:]), {paths[0]}]
    assert "held out: 1 of 12 recordings; 1 of 1 lines of n.txt name some\n" == capsys.readouterr().out
    Path("n.txt").write_text("2\n4\n")
    assert divided("set", "--out=u", "--hold-out=n.txt", "--by=speaker")[1] == set(paths[4:8])
    assert capsys.readouterr().out == ("held out: 1 of 3 speakers (2), 4 of 12 recordings; 1 of 2 lines of n.txt name some, "
                                       "not '4'\n")
    Path("n.txt").write_text("8\n")
    assert divided("set", "--out=u", "--hold-out=n.txt", "--by=folder")[1] == {path for path in paths if "/8/" in path}


def test_recordings_that_are_added_go_to_their_sides_and_none_changes_sides(here, capsys):
    make(LIBRI[:6])
    common = ("LibriSpeech", "--hold-out=0.01", "--by=speaker")
    encode(*common, "--out=u")
    val = {path.name: path.read_bytes() for path in Path("u/val").iterdir()}
    make(LIBRI[6:])
    encode(*common, "--out=u")
    assert sides("u") == (set(LIBRI[4:]), set(LIBRI[:4])) and "none of the files are new" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("u/val").iterdir()} == val
    encode("LibriSpeech/train-clean-100/1034", "--hold-out=0.01", "--out=u")  # nobody of them is held out: val is there already
    before = {path: path.read_bytes() for path in Path("u").rglob("*.*")}
    Path("keep.txt").write_text("84-1-0000\n")
    for words, held in (("--hold-out=0.999", "u/train holds .*/1034/"), ("--hold-out=1e-6", f"u/val holds .*/{OUT}/"),
                        ("--hold-out=0.01 --seed=1", f"u/val holds .*/{OUT}/"),
                        ("--hold-out=0.01 --keep=keep.txt", "u/train holds .*/1034/")):
        with pytest.raises(ValueError, match=f"{held}.*not for it.*--overwrite"):
            encode("LibriSpeech", "--out=u", *words.split())
    with pytest.raises(ValueError, match="u/train holds units, perhaps of a call with --hold-out; repeat"):
        encode("LibriSpeech", "--out=u")
    assert {path: path.read_bytes() for path in Path("u").rglob("*.*")} == before
    encode("LibriSpeech", "--out=u", "--hold-out=keep.txt", "--overwrite")
    assert sides("u") == (set(LIBRI) - {LIBRI[4]}, {LIBRI[4]})


def test_a_folder_of_a_call_without_hold_out_is_not_divided_afterwards(here):
    make(LIBRI[2:6])
    encode("LibriSpeech", "--out=u")
    before = sorted(Path("u").rglob("*"))
    with pytest.raises(ValueError, match="u holds units of a call without --hold-out; choose another --out"):
        encode("LibriSpeech", "--out=u", "--hold-out=0.01")
    Path("keep.txt").write_text(f"{Path(LIBRI[2]).name}\n")
    with pytest.raises(ValueError, match="u holds .*0001.flac, which is not for it by this --keep"):
        encode("LibriSpeech", "--out=u", "--keep=keep.txt")
    assert sorted(Path("u").rglob("*")) == before
    Path("w/val/work").mkdir(parents=True)  # of a call with --hold-out that was interrupted
    with pytest.raises(ValueError, match="w/val holds units, perhaps of a call with --hold-out"):
        encode("LibriSpeech", "--out=w")


@pytest.mark.parametrize("share, part", [("1e-9", "val"), ("0.999999", "train")])
def test_a_side_without_recordings_is_an_error_before_any_work(share, part, here, capsys):
    empty_files(*LIBRI)
    with pytest.raises(ValueError, match=f"no recording is for u/{part}: .*few speakers.*--seed.*file that lists"):
        divided("LibriSpeech", "--out=u", f"--hold-out={share}")
    assert "held out: " in capsys.readouterr().out and not Path("u").exists()


# ---------------------------------------------------------------------------------------------- kept

def test_a_recording_is_kept_by_any_of_its_names(here, capsys):
    paths = ["a/x.wav", "a/y.b.flac", "b/x.wav", "b/z.ogg", os.fsdecode(b"b/\xff\xe4.wav"), "b/ l\u00e4ut .mp3", "b/left.wav"]
    empty_files(*paths)
    for line, kept in ((b"a/x.wav", {0}), (b"./a//x.wav", {0}), (b"x", {0, 2}), (b"y.b", {1}), (b"y.b.flac", {1}), (b"y", set()),
                       (os.fsencode(here / "b/z.ogg"), {3}), (b"\xff\xe4", {4}), (b"b/\xff\xe4.wav", {4}),
                       (" l\u00e4ut ".encode(), {5}), (b"\xef\xbb\xbfz.ogg\r\n\r\nnot there\r\nz\r\n", {3})):
        Path("n.txt").write_bytes(line)
        if kept:
            assert divided("a", "b", "--out=u", "--keep=n.txt") == [{paths[i] for i in kept}], line
            continue
        with pytest.raises(ValueError, match="n.txt names no recording that is there, such as a/x.wav; a line is a path, or"):
            divided("a", "b", "--out=u", "--keep=n.txt")
    assert "kept: 1 of 7 recordings; 2 of 3 lines of n.txt name some, not 'not there'" in capsys.readouterr().out


def test_what_is_not_kept_is_neither_trained_on_nor_held_out(here):
    empty_files(*LIBRI, "set/no/number.wav")
    Path("n.txt").write_text("\n".join(Path(name).stem for name in LIBRI[2:5]))
    assert divided("LibriSpeech", "set", "--out=u", "--hold-out=0.01", "--keep=n.txt") == [{LIBRI[4]}, set(LIBRI[2:4])]


# ---------------------------------------------------------------------------------------------- malformed

@pytest.mark.parametrize("words, content, said", [
    *((f"--hold-out={share}", "", "expected a share above 0 and below 1")
      for share in ("0", "1", "1.5", "-0.1", "nan", "inf", "1_0")),
    ("--hold-out=1%", "", "--hold-out=1%: no such file; give"), ("--hold-out=nowhere.txt", "", "nowhere.txt: no such file; give"),
    ("--hold-out=set", "", "--hold-out=set: no such file; give"), ("--keep=nowhere.txt", "", "--keep=nowhere.txt: no such file"),
    ("--keep=n.txt", "", "--keep=n.txt names nothing; write one name a line"), ("--keep=n.txt", " \r\n\n", "n.txt names nothing"),
    ("--hold-out=n.txt", "", "--hold-out=n.txt names nothing"), ("--keep=n.txt", "a\0b\n", "bytes of value 0, so it is no text"),
    ("--hold-out=0.5 --by=speakers", "", "--by=speakers: expected one of speaker, folder, file"),
    ("--hold-out=n.txt", "elsewhere.wav\n", "no recording is for u/val"),
    ("--keep=n.txt", "elsewhere.wav\n", "names no recording")])
def test_what_cannot_be_meant_is_a_sentence_and_nothing_is_written(words, content, said, here):
    empty_files(*(f"set/{reader}/1/a.wav" for reader in range(9)))
    Path("n.txt").write_text(content)
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        encode("set", "--out=u", *words.split())
    assert not Path("u").exists()


def test_options_that_have_no_effect_are_named(capsys):
    options("a.wav", "--by=folder")
    options("a.wav", "--fit=3", "--keep=n.txt")
    assert capsys.readouterr().err == "--by has no effect without --hold-out\n--keep has no effect with --fit=3\n"


# ---------------------------------------------------------------------------------------------- many, and many processes

def test_a_listing_is_divided_in_a_few_bytes_a_name(here, monkeypatch):
    monkeypatch.setattr(extract, "walk", lambda root, seen: made_up(10_000))
    monkeypatch.setattr(listing, "RUN", 1000)
    monkeypatch.setattr(listing, "BLOCK", 100)
    selection.drawn.cache_clear()
    Path("recordings").mkdir()
    tracemalloc.start()
    try:
        train, val = selection.divide(options("recordings", "--out=u", "--hold-out=0.01", "--by=file")).values()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    count = sum(1 for _ in val)
    assert 10_000 - count == sum(1 for _ in train) and 50 < count < 150 and peak < 150 * 10_000


@pytest.mark.slow
def test_two_processes_divide_as_one(here):
    make(LIBRI)
    make(["LibriSpeech/a.txt"])
    words = ["LibriSpeech", "--device=cpu", "--hold-out=0.01", "--by=speaker"]
    encode("LibriSpeech", "--hold-out=0.01", "--by=speaker", "--out=one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "hubert_units.py"]
    for times in range(2):
        result = subprocess.run([*launcher, *words, "--out=two"], capture_output=True, text=True, timeout=120,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("held out: 1 of 3 speakers (45), 4 of 8") == result.stderr.count("passed over: 1 .txt") == 1
        assert result.stdout.count("none of the files are new") == 2 * times
        for part in ("train", "val"):
            for file in Path("one", part).iterdir():
                assert file.read_bytes() == Path("two", part, file.name).read_bytes(), file
    result = subprocess.run([*launcher, *words, "--out=three", "--seed=9"], capture_output=True, text=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode and result.stderr.count("error: no recording is for three/val") == 1 and not Path("three").exists()
