"""A page that any browser opens from the disk: one HTML file with its style, script and pictures inside.

    title, body, data for the script --document--> text --write--> PATH
    pixels --png--> bytes --data_address--> what an <img> shows;  samples --sound--> FLAC --data_address--> what an <audio> plays

Whatever comes from outside (names of files, options, transcripts) goes through escape(), or to the script as JSON in which no "<"
is left. The page's own policy lets nothing run but the script that it was written with, which is known by its hash, and lets
nothing be fetched but sound that lies on the disk beside it.
"""
import base64
import hashlib
import html
import io
import json
import os
import struct
import zlib
from pathlib import Path
from urllib.parse import quote

import torch

from checkpoints import files
from speech.audio import soundfile, wav_bytes

HERE = Path(__file__).parent
POLICY = ("default-src 'none'; img-src data:; media-src 'self' file: data: blob:; style-src 'unsafe-inline'; "
          "script-src 'sha256-{}'; base-uri 'none'; form-action 'none'")


def escape(text):
    """Anything as text in HTML, in attributes too; bytes of a file's name that are no text are shown as \\udc80 and the like."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def document(title, body, script="", data=None):
    """A whole page. body: HTML. script: name of a .js file in this folder; data: JSON that it reads from #data."""
    style, code = (HERE / "style.css").read_text(), (HERE / f"{script}.js").read_text() if script else ""
    policy = POLICY.format(base64.b64encode(hashlib.sha256(code.encode()).digest()).decode())
    said = json.dumps(data).replace("<", "\\u003c")
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n"
            f'</main>\n<script type="application/json" id="data">{said}</script>\n<script>{code}</script>\n</body>\n</html>\n')


def facts(pairs):
    """(name, value) pairs as a list; what has no value is left out."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value is not None)
    return f'<dl class="facts">{rows}</dl>'


def write(path, text, keep=True):
    """Write a page; another one that stands there is kept under a number (index-1.html), unless it is only out of date."""
    (files.write_beside if keep else files.write_text)(path, text)


# ---------------------------------------------------------------------------------------------- sound and pictures

def address(path, folder):
    """Of a file, as seen from a page in `folder`: relative, with everything quoted that an address cannot hold."""
    return quote(os.fsencode(os.path.relpath(path, folder)))


def data_address(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def flac(wav):
    """Samples (S,) in [-1, 1] -> a FLAC file of 16 bits without a comment: exact as a wav of them, and known to every browser."""
    whole_numbers, rate = soundfile.read(io.BytesIO(wav_bytes(wav)), dtype="int16")
    out = io.BytesIO()
    soundfile.write(out, whole_numbers, rate, format="FLAC")
    return out.getvalue()


def sound(wav):
    """Samples (S,) in [-1, 1] -> an address that holds them all."""
    return data_address("audio/flac", flac(wav))


def player(source, label, preload="metadata"):
    """source: an address. A browser's own controls, which need no script; label: what a screen reader says."""
    return f'<audio controls preload="{preload}" src="{escape(source)}" aria-label="{escape(label)}"></audio>'


def png(pixels, palette):
    """Picture (H, W) uint8 of colours in a palette (colours, 3) uint8 -> the bytes of a PNG file."""
    height, width = pixels.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels], dim=1)  # each row begins with its filter: none

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits that index a palette
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette.numpy().tobytes())
            + chunk(b"IDAT", zlib.compress(rows.numpy().tobytes(), 9)) + chunk(b"IEND", b""))
