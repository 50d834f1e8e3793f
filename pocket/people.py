"""Recordings of people -> what the factory learns from: 16 kHz flac, a folder a voice, some of them held out.

    FOLDER (any tree, any format) --> OUT/train/VOICE/NAME.flac, OUT/val/VOICE/NAME.flac, a phones.tsv in both

The voice is the folder that a recording lies in, or what stands before the first "-" of names like LibriSpeech's. Of a voice
with many recordings every twentieth is held out; of the other voices every tenth, with all that it says: units must hold for
voices that nobody has heard. transcripts.tsv (file, text) beside recordings and phones.tsv (path, START:PHONE ... in seconds)
in FOLDER are used where they are there; nothing needs them.

A voice more is `quiet`: silence and faint noise, so that the units of pauses are learnt, and not only between words.

    python -m pocket.people --recordings=FOLDER --out=build/people
"""
import csv
import hashlib
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch

import config
from checkpoints import files
from corpus.extract import find_audio, tried
from pocket import augment
from pocket.recordings import COLUMNS, QUIET_VOICE, TABLE
from speech.audio import SAMPLE_RATE, read_wav

MANY = 100  # recordings of a voice, from which some are held out instead of the voice
QUIET, QUIET_SECONDS = {"train": 60, "val": 6}, 6  # recordings without a voice, and the length of each


@dataclass(frozen=True)
class PeopleConfig:
    recordings: str = ""  # folder of recordings of people
    out: str = "build/people"  # folder for train/ and val/


def voice_of(path):
    """1089-134686-0000.flac -> 1089; anything else -> its folder's name."""
    named = re.match(r"(\d+)-\d+-\d+$", path.stem)
    return named.group(1) if named else path.parent.name


def held_out(voices):
    """{voice: [path, ...]} -> the paths of the validation set, by hash: more recordings leave the others where they are."""
    def share(text):
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
    found = set()
    for voice, paths in voices.items():
        if len(paths) >= MANY:
            found |= {path for path in paths if share(path.stem) < 0.05}
        elif share(voice) < 0.1:
            found |= set(paths)
    return found or {sorted(path for paths in voices.values() for path in paths)[-1]}


def tables(folder, paths):
    """Texts and phones of recordings: {path: text}, {path: "START:PHONE ..."} of those that are known."""
    texts, phones = {}, {}
    for table in {path.parent / "transcripts.tsv" for path in paths}:
        if table.exists():
            texts |= {table.parent / name: text for name, text in rows(table)}
    if (folder / TABLE).exists():
        phones = {folder / name: events for name, events in rows(folder / TABLE)}
    return texts, phones


def rows(table):
    """The first two columns of a tab-separated file."""
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if line.count("\t") < 1:
            raise ValueError(f"{table}:{number} has no tab; expected a file's name, a tab, and what belongs to it")
        yield line.split("\t")[:2]


def save(path, samples):
    stream = io.BytesIO()
    soundfile.write(stream, samples.clamp(-1, 1).numpy(), SAMPLE_RATE, subtype="PCM_16", format="flac")
    files.write_bytes(path, stream.getvalue())


def main(argv=None):
    options = config.load(PeopleConfig, argv)
    if not options.recordings:
        raise ValueError("no recordings given: python -m pocket.people --recordings=FOLDER")
    folder, out = Path(options.recordings), Path(options.out)
    for part in ("train", "val"):
        files.refuse_existing(out / part / TABLE, remedy="delete the folder, or give another --out")
    paths, voices = find_audio([folder]), defaultdict(list)
    for path in paths:
        voices[voice_of(path)].append(path)
    if QUIET_VOICE in voices:
        raise ValueError(f"{voices[QUIET_VOICE][0]} lies in a folder {QUIET_VOICE}, which is kept for silence; rename the folder")
    texts, phones = tables(folder, paths)
    apart, seconds, written = held_out(voices), {"train": 0.0, "val": 0.0}, {"train": [], "val": []}
    taken, failed = set(), 0
    for path in config.progress(paths, desc="recordings"):
        samples = tried(read_wav, path)
        if isinstance(samples, Exception):
            files.note(f"{path}: {samples}; left out")
            failed += 1
            continue
        part, stem, copy = "val" if path in apart else "train", f"{voice_of(path)}/{path.stem}", 1
        while (name := f"{stem}{f'-{copy}' * (copy > 1)}.flac") in taken:  # 1.wav beside 1.mp3, or two folders called anna
            copy += 1
        taken.add(name)
        save(out / part / name, samples)
        written[part].append([name, voice_of(path), texts.get(path, ""), phones.get(path, "")])
        seconds[part] += len(samples) / SAMPLE_RATE
    generator = torch.Generator().manual_seed(0)
    for part, count in QUIET.items():
        for i in range(count):
            level = 0.0 if i == 0 else 10 ** augment.uniform(-4, -1.5, generator)
            save(out / part / f"{QUIET_VOICE}/{i}.flac", level * augment.noise(QUIET_SECONDS * SAMPLE_RATE, generator))
            written[part].append([f"{QUIET_VOICE}/{i}.flac", QUIET_VOICE, "", "0.00:SIL"])
    for part, table in written.items():
        stream = io.StringIO()
        csv.writer(stream, delimiter="\t").writerows([COLUMNS, *table])
        files.write_bytes(out / part / TABLE, stream.getvalue().encode())
        print(f"{part}: {len(table)} recordings, {seconds[part] / 3600:.2f} h, {len({row[1] for row in table})} voices, "
              f"{sum(bool(row[3]) for row in table)} with phones")
    print(f"{failed} of {len(paths)} files could not be read")


if __name__ == "__main__":
    config.command(main)
