"""Where the recordings in a file begin and really end, whatever its headers announce.

    file --walk: RIFF chunks, au, flac, ogg pages, MPEG frames--> [Part], each a file of its own --View--> libsndfile

Headers are wrong where a program could not go back to write the length (pipes, crashes, 4 GiB), counted its own header, or where
files were joined one behind another. libsndfile believes them. Here the walk decides, and a View shows libsndfile the same bytes
with a right length. Nothing is held in memory but a block.
Sources: RIFF (IBM and Microsoft 1991), EBU Tech 3306 (RF64), Sony's W64, Apple's AIFF and CAF, RFC 9639 (flac), RFC 3533 (ogg),
ISO 11172-3 and 13818-3 (MPEG audio).
"""
import functools
import io
import itertools
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass

AGAIN = "copy or download it again"
UNKNOWN = {4: 0x7F00_0000, 8: 2**62}  # programs that write into a pipe announce this or more, by bytes of the field
HEADER = 44  # bytes; some recorders count a wav's header as samples: so much may be missing
MOST_LOST = 4096  # bytes between two MPEG frames that may be no frame: more is a hole
# Files of chunks: byte order; bytes of the head, of a chunk's name, of its size; what the size counts beyond; their boundary.
CHUNKED = {b"RIFF": ("little", 12, 4, 4, 0, 2), b"RF64": ("little", 12, 4, 4, 0, 2), b"RIFX": ("big", 12, 4, 4, 0, 2),
           b"FORM": ("big", 12, 4, 4, 0, 2), b"caff": ("big", 8, 4, 8, 0, 1), b"riff": ("little", 40, 16, 8, 24, 8)}
SYNC = re.compile(rb"\xff[\xe0-\xff]", re.DOTALL)  # an MPEG frame begins so, and much else
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by bits of the MPEG version
KBPS = {(True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),  # by MPEG-1 or not, bits of the layer
        (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
        **dict.fromkeys([(False, 2), (False, 1)], (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160))}


@dataclass
class Part:
    """One recording in a file. pieces: (begin, end) in the file, or bytes in place of its own."""
    pieces: list
    frames: int | None = None  # samples per channel that are there at least; None: what libsndfile says
    claim: int = 1  # the length is given as so many times the true one, where it would stop at one that it guesses


class View(io.RawIOBase):
    """Pieces of a file, one behind another, as a file to be read."""

    def __init__(self, file, part):
        self.file, self.pieces, self.at = file, part.pieces, 0
        sizes = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in part.pieces)
        self.begins = [0, *itertools.accumulate(sizes)]
        self.size = self.begins[-1] * part.claim

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer):
        done, end = 0, self.begins[-1]
        while done < len(buffer) and self.at < end:
            i = bisect_right(self.begins, self.at) - 1
            piece, skip = self.pieces[i], self.at - self.begins[i]
            size = min(len(buffer) - done, self.begins[i + 1] - self.at)
            block = piece[skip:skip + size] if isinstance(piece, bytes) else peek(self.file, piece[0] + skip, size)
            if not block:
                break
            buffer[done:done + len(block)] = block
            done, self.at = done + len(block), self.at + len(block)
        if self.at > end:  # only in a claimed length: a decoder that looks for a title at the end finds zeros
            done = max(0, min(len(buffer), self.size - self.at))
            buffer[:done] = bytes(done)
            self.at += done
        return done


def peek(file, at, size):
    file.seek(min(at, 2**43))  # a damaged size leads beyond what a disk allows
    return file.read(size)


def search(file, pattern, at, end):
    """Where the pattern (a compiled one, of at most 8 bytes) matches first in file[at:end]; end if nowhere."""
    while at < end:
        block = peek(file, at, 1 << 13)  # what looks like an MPEG frame is frequent
        if match := pattern.search(block):
            return min(end, at + match.start())
        at += max(1, len(block) - 7)
    return end


def parts(file, name=""):
    """The recordings in an open file, in order; empty for what libsndfile alone knows. name: its ending says that it is mp3.

    Raises: ValueError if a header promises much more than is there, or bytes between MPEG frames are no frames.
    """
    end, at, found = file.seek(0, io.SEEK_END), 0, []
    named = end > 0 and name.lower().endswith((".mp3", ".mp2", ".mp1", ".mpga"))
    while at < end:
        begin = at
        while skip := tag(file, at):
            at += skip
        magic = peek(file, at, 4)
        if magic in READERS:
            more, at = READERS[magic](file, at, end)
        elif at > begin or magic[:1] == b"\xff" or named:
            more, at = mpeg(file, at, end)
            if named and not more and not found:
                raise ValueError(f"holds no MPEG audio; {AGAIN}, or name it as what it is")
        else:
            break
        found += more
    return found


def tag(file, at):
    """Bytes of a title, picture or the like (ID3v2, ID3v1, APE) that begins here; 0 if none does."""
    head = peek(file, at, 16)
    if head[:3] == b"ID3" and len(head) >= 10:
        return 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:10])) + 10 * bool(head[5] & 16)
    if head[:8] == b"APETAGEX":
        return 32 + int.from_bytes(head[12:16], "little")
    return 128 if head[:3] == b"TAG" else 0


def untagged(file, end):
    """Where the audio before `end` ends: titles that can be told by their last bytes (ID3v1, APE, Lyrics3) are left out."""
    while end > 0:
        back = peek(file, max(0, end - 128), min(128, end))
        size = (128 if back[:3] == b"TAG" else int.from_bytes(back[-20:-16], "little") if back[-32:-24] == b"APETAGEX"
                else 15 + int(back[-15:-9]) if back[-9:] == b"LYRICS200" and back[-15:-9].isdigit() else 0)
        if not 0 < size <= end:
            break
        end -= size
    return end


# ---------------------------------------------------------------------------------------------- headers that hold a length

def edited(start, end, changes):
    """Pieces of file[start:end] with changes (begin, end, bytes in its place)."""
    pieces = []
    for begin, until, new in sorted(changes):
        pieces += [(start, begin), new]
        start = until
    return [*pieces, (start, end)]


def length(announced, width, begin, following, end):
    """Bytes of samples that begin at `begin`. following: where what is known follows their announced end; None: nowhere."""
    rest = max(0, end - begin)
    if rest + HEADER < announced < UNKNOWN[width]:
        raise ValueError(f"is cut short: its header promises {announced} bytes, {rest} are there; {AGAIN}")
    return rest if announced > rest or following is None else announced


def chunked(file, start, end):
    """A file of chunks. Returns its Parts, and where it ends."""
    magic = peek(file, start, 4)
    order, head, name, width, counted, boundary = CHUNKED[magic]

    def chunk(at):
        """Name, size and begin of the content of a chunk; None where none can be."""
        row = peek(file, at, name + width)
        if len(row) == name + width and re.fullmatch(rb"[ -~]{4}", row[:4]):
            return row[:4], max(0, int.from_bytes(row[name:], order) - counted), at + name + width

    def behind(at):
        """Where the chunk after one that ends here begins; some writers forget to fill up to the boundary."""
        full = at + (start - at) % boundary
        return at if full != at and (chunk(at) or tag(file, at)) else full

    at, sizes, fmt, changes = start + head, None, b"", []
    while (found := chunk(at)) and found[0] not in (b"data", b"SSND", b"BODY"):
        kind, size, begin = found
        sizes = begin if kind == b"ds64" else sizes
        fmt = peek(file, begin, 2) if kind == b"fmt " else fmt
        at, before = behind(begin + size), at
        if kind == b"LIST":  # a title may hold anything, and libsndfile looks into it
            changes.append((before, at, b""))
    if not found:
        return [Part([(start, end)])], end  # libsndfile will say what is wrong
    _, announced, begin = found
    field = begin - width
    if magic == b"RF64" and sizes and announced == 0xFFFF_FFFF:
        field, width = sizes + 8, 8
        announced = int.from_bytes(peek(file, field, width), order)

    following = behind(begin + min(announced, end - begin))
    while following < end and not tag(file, following) and (found := chunk(following)) and found[0] not in READERS:
        following = behind(found[2] + found[1])
        if following > end + 1 and found[0] not in (b"LIST", b"id3 "):  # samples that look like the name of a chunk
            break
    known = end - 1 <= following <= end + 1 or tag(file, following) or is_mpeg(file, following, end) \
        or found and found[0] in (*READERS, b"LIST", b"id3 ")
    size = length(announced, width, begin, following if known else None, end)
    following = min(following, end) if size == announced else end
    if fmt in (b"P\0", b"U\0"):  # MPEG frames
        return mpeg(file, begin, begin + size)[0], following
    if size > 2**(8 * width) - 1:
        if magic != b"RIFF":
            raise ValueError("holds more samples than its format can announce; convert it to flac")
        table = struct.pack("<4sIQQQI", b"ds64", 28, 0, size, 0, 0)
        changes += [(start, start + 4, b"RF64"), (start + head, start + head, table), (field, begin, b"\xff" * width)]
    elif size != announced:
        changes.append((field, field + width, (size + counted).to_bytes(width, order)))
    return [Part(edited(start, following, changes))], following


def au(file, start, end):
    """A Sun au file. Returns its Parts, and where it ends."""
    order = "big" if peek(file, start, 1) == b"." else "little"
    begin, announced = (int.from_bytes(peek(file, start + at, 4), order) for at in (4, 8))
    begin = max(24, begin)
    following = start + begin + announced
    known = following == end or peek(file, following, 4) in READERS
    size = length(announced, 4, start + begin, following if known else None, end)
    following = following if size == announced else end
    changes = [] if size == announced else [(start + 8, start + 12, min(size, 0xFFFF_FFFF).to_bytes(4, order))]
    return [Part(edited(start, following, changes))], following


def nist(file, start, end):
    """A NIST sphere file: its length stands in a header of text."""
    found = re.search(rb"sample_count -i (\d+)", peek(file, start, 1024))
    return [Part([(start, end)], frames=int(found[1]) if found else None)], end


# ---------------------------------------------------------------------------------------------- streams

def flac(file, start, end):
    """A flac file, its length taken out: so it is read to its real end. Returns its Part, and where the next one begins."""
    following = search(file, re.compile(rb"fLaC[\0\x80]\0\0\x22", re.DOTALL), start + 4, end)
    row = peek(file, start + 21, 5)  # the last 4 bits of the sample's width, 36 of the length
    frames = int.from_bytes(row, "big") & 2**36 - 1
    until = untagged(file, following)
    return [Part(edited(start, until, [(start + 21, start + 26, bytes([row[0] & 0xF0, 0, 0, 0, 0]))] if frames else []),
                 frames=frames or None)], following


def ogg(file, at, end):
    """The streams that follow one another, each from its first page (or those of its tracks) to that of the next."""
    begins, inside = [at], False
    while at < end:
        head = peek(file, at, 27)
        if head[:4] != b"OggS" or len(head) < 27:
            at = search(file, re.compile(b"OggS"), at + 1, end)
            continue
        first = head[5] & 2
        if first and inside:
            begins.append(at)
        inside = not first
        at += 27 + head[26] + sum(peek(file, at + 27, head[26]))
    return [Part([span]) for span in itertools.pairwise([*begins, end])], end


@functools.lru_cache(maxsize=4096)
def mpeg_frame(head):
    """Kind (frames of one kind are decoded together), bytes and samples of the frame with these four bytes of head; or None."""
    if len(head) < 4 or head[0] != 255 or head[1] < 224:
        return None
    version, layer, index, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 0 or index in (0, 15) or rate == 3:
        return None
    bits, hertz = 1000 * KBPS[version == 3, layer][index - 1], RATES[version][rate]
    samples = 384 if layer == 3 else 576 if layer == 1 and version != 3 else 1152
    slot = 4 if layer == 3 else 1  # bytes in which the length is counted
    return (version, layer, rate, head[3] >> 6 == 3), slot * (samples * bits // (8 * slot * hertz) + (head[2] >> 1 & 1)), samples


def is_mpeg(file, at, end):
    """Whether three frames of one kind follow here, or fewer up to the end or a tag."""
    kinds = set()
    for _ in range(3):
        if not (frame := mpeg_frame(peek(file, at, 4))):
            return bool(kinds) and tag(file, at) > 0
        kinds.add(frame[0])
        at += frame[1]
        if at >= end:
            return at == end and len(kinds) == 1
    return len(kinds) == 1


def next_mpeg(file, at, end):
    """Where MPEG frames begin, from a byte on; end if nowhere."""
    while (at := search(file, SYNC, at, end)) < end and not is_mpeg(file, at, end):
        at += 1
    return at


def announced_frames(head, kind):
    """How many frames follow, by what an mp3's first frame holds instead of sound (0: it does not say); None: it is sound."""
    version, layer, _, mono = kind
    at = 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
    if layer == 1 and head[at:at + 4] in (b"Xing", b"Info"):
        return int.from_bytes(head[at + 8:at + 12], "big") if head[at + 7] & 1 else 0
    return 0 if head[36:40] == b"VBRI" else None


@dataclass
class Run:
    """MPEG frames of one kind. announced: as announced_frames; tagged: bytes of the frame that says so."""
    kind: tuple
    samples: int
    announced: int | None
    tagged: int
    spans: list
    frames: int = 0


def mpeg(file, at, end):
    """MPEG audio: a Part for each run of frames of one kind, or that a frame with their number begins. Tags are left out.

    Returns: the Parts, and where they end: at `end`, or where a file of another kind was joined.
    """
    runs, last, following, end = [], None, end, untagged(file, end)  # last: where the last frame begins
    if peek(file, at, 3)[2:] < b"\x10" and mpeg_frame(peek(file, at, 2) + b"\x10\0"):
        raise ValueError("is MPEG audio of free format, whose frames do not tell their length; convert it to flac")
    while at < end:
        head = peek(file, at, 64)
        frame = mpeg_frame(head[:4])
        if (not frame or not runs or frame[0] != runs[-1].kind) and not is_mpeg(file, at, end):
            if skip := tag(file, at):
                at, last = at + skip, None
                continue
            if runs and peek(file, at, 4) in READERS:
                following = at
                break
            found = next_mpeg(file, at if last is None else last + 4, end)
            if last is not None and found < at:  # the last frame was cut, what follows begins in it
                runs[-1].spans[-1] = (runs[-1].spans[-1][0], last)
                runs[-1].frames = max(0, runs[-1].frames - 1)
            elif runs and at + MOST_LOST < found:
                raise ValueError(f"is damaged: {found - at} of its bytes, from byte {at} on, are no MPEG audio; {AGAIN}")
            at, last = found, None
            continue
        kind, size, samples = frame
        if at + size > end:
            break  # the rest of a frame that was cut off
        announced = announced_frames(head, kind)
        if announced is not None or not runs or kind != runs[-1].kind:
            runs.append(Run(kind, samples, announced, 0 if announced is None else size, [(at, at)]))
        run = runs[-1]
        run.frames += announced is None
        begin = run.spans.pop()[0] if run.spans[-1][1] == at else at
        run.spans.append((begin, at + size))
        last, at = at, at + size

    found = []
    for run in (run for run in runs if run.frames):
        missing = (run.announced or 0) - run.frames
        if missing > 2:  # encoders do not agree what to count
            raise ValueError(f"is cut short: its header promises {run.announced} MPEG frames, {run.frames} are there; {AGAIN}")
        if run.announced and missing >= 0:  # then it also tells what the encoder added at both ends, which libsndfile takes away
            found.append(Part(run.spans))
        else:
            (begin, until), *spans = run.spans
            found.append(Part([(begin + run.tagged, until), *spans], run.frames * run.samples, claim=64))
    return found, following


READERS = {**dict.fromkeys(CHUNKED, chunked), b".snd": au, b"dns.": au, b"NIST": nist, b"fLaC": flac, b"OggS": ogg}
