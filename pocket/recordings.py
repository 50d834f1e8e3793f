"""Folders of recordings, in memory, with the phone and the voice of every frame where a table says them.

    FOLDER/**/*.flac, FOLDER/phones.tsv (file, voice, text, phones: START:PHONE ... in seconds) --> Speech

Frames are those of the pocket HuBERT: 25 a second, frame f sees samples 640 f to 640 f + 720. Without a table a recording's voice
is the folder that it lies in, and its phones are unknown (-1).
Shapes: S samples, F frames of a recording, N frames of all.
"""
import csv
import os
from pathlib import Path

import torch

import config
from corpus.extract import find_audio
from speech.audio import SAMPLE_RATE, read_wav

HOP, FIELD = 640, 720  # samples per frame and samples that one frame sees
TABLE, COLUMNS = "phones.tsv", ("file", "voice", "text", "phones")
QUIET_VOICE = "quiet"  # of recordings in which nobody speaks


def read_table(folder):
    """{path: row of FOLDER/phones.tsv}; without such a file none."""
    path = Path(folder, TABLE)
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if rows and not {"file", "phones"} <= set(rows[0]):
        raise ValueError(f"{path} has the columns {', '.join(rows[0])}; expected {', '.join(COLUMNS)}, separated by tabs")
    return {os.path.normpath(Path(folder, row["file"])): row for row in rows}


def split(folders):
    """--speech=A,B as a tuple of folders."""
    return tuple(folder for folder in folders.split(",") if folder)


def integers(wav):
    """Samples (S,) in [-1, 1] -> int16: those of a file of 16 bits, where they come from one."""
    return (wav * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)


class Speech:
    """Recordings as one int16 tensor. folders: of recordings; only: so many of each, spread over it; None: all.

    Attributes: names (paths, as in unit shards); samples (S,) of all; frames, starts, frame_starts (recordings,): frames of each,
        its first sample, and the row of its frame 0 in tensors of every frame; voices, texts (a recording each); folder_of.
    """

    def __init__(self, *folders, only=None):
        self.names, self.rows, self.folder_of = [], [], []
        for number, folder in enumerate(folders):
            table, paths = read_table(folder), find_audio([folder])
            for path in paths[::max(1, len(paths) // only)] if only else paths:
                self.names.append(str(path))
                self.rows.append(table.get(os.path.normpath(path), {}))
                self.folder_of.append(number)
        waves = [integers(read_wav(name)) for name in config.progress(self.names, desc="reading")]
        self.samples = torch.cat(waves)
        lengths = torch.tensor([len(wave) for wave in waves])
        self.starts = lengths.cumsum(0) - lengths
        self.frames = ((lengths - FIELD) // HOP + 1).clamp(min=0)
        self.frame_starts = self.frames.cumsum(0) - self.frames
        self.voices = [row.get("voice") or Path(name).parent.name for name, row in zip(self.names, self.rows)]
        self.texts = [row.get("text", "") for row in self.rows]

    @property
    def hours(self):
        return len(self.samples) / SAMPLE_RATE / 3600

    def wave(self, i, first_frame=0, frames=None):
        """Samples that exactly `frames` frames of recording i see, float32."""
        frames = int(self.frames[i]) - first_frame if frames is None else frames
        start = int(self.starts[i]) + first_frame * HOP
        return self.samples[start:start + (frames - 1) * HOP + FIELD].float() / 2**15

    def voice_labels(self):
        """(N,) int64, a number for each voice of each folder."""
        numbers = {}
        each = [numbers.setdefault(voice, len(numbers)) for voice in zip(self.folder_of, self.voices)]
        return torch.tensor(each).repeat_interleave(self.frames)

    def phone_labels(self):
        """(N,) int64 and the phones' names: what sounds at the centre of each frame; -1 in recordings that have no phones.

        Every folder's phones are its own: tables may come from different alphabets.
        """
        numbers, found = {}, []
        for row, folder, frames in zip(self.rows, self.folder_of, self.frames.tolist()):
            events = [event.partition(":") for event in row.get("phones", "").split()]
            if not events:
                found.append(torch.full((frames,), -1))
                continue
            starts = torch.tensor([float(start) for start, _, _ in events])
            ids = torch.tensor([numbers.setdefault((folder, phone.strip("',%=_|") or "pause"), len(numbers))
                                for _, _, phone in events])
            centers = (torch.arange(frames) * HOP + FIELD / 2) / SAMPLE_RATE
            found.append(ids[(torch.searchsorted(starts, centers, right=True) - 1).clamp(min=0)])
        return torch.cat(found), [phone for _, phone in numbers]
