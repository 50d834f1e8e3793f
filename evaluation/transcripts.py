"""What a recogniser heard: wavs -> transcripts, by any command; words of a text, word error; tokens of a text LM.

    wavs --a command of the user's, several at once--> Transcripts --transcripts.jsonl--> read_transcripts, the next time
    reference, transcript --words_of--> words --word_errors--> substitutions, deletions, insertions

The words of a text, for all measures: lower case, compatibility forms made plain (NFKC), ’ as '; a word is a run of letters,
their marks and digits, with apostrophes inside (don't, o'clock). So hyphens divide words, other punctuation vanishes, and numbers
stay as they are written: "3" is not "three". Scripts without spaces are not divided.

Word error is (substitutions + deletions + insertions) / words of the reference.
"""
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from checkpoints.files import read_json
from checkpoints.pretrained import lm_architecture, read_settings
from checkpoints.recognise import check_values

PATIENCE = 600  # seconds that a recogniser may take for one recording
PLACE = re.compile(r"\{(?:wav)?\}")  # of the file's name in the command; without one it comes last


@dataclass(frozen=True)
class Transcript:
    system: str  # who speaks: model, versus, ...; see speaking.py
    name: str  # of the document, as the wav is called
    text: str
    scored: tuple[float, float] | None = None  # (nats, tokens): its log-probability under a text LM that is not here


def words_of(text):
    """The words of a text, as the head of this file says."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = (each if each == "'" or unicodedata.category(each)[0] in "LMN" else " " for each in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'"))]


def word_errors(said, heard):
    """Two lists of words -> (substitutions, deletions, insertions) that turn what was said into what was heard.

    They are as few as possible together, and of all such ways one with the fewest deletions and insertions: an error costs
    `unit`, these two 1 more, which no number of them makes as dear as another error.
    """
    numbers = {}
    first, second = (np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64) for words in (said, heard))
    unit = len(said) + len(heard) + 1
    inserted = np.arange(len(heard) + 1) * (unit + 1)
    row = inserted.copy()  # row[j]: cost of the words so far against the first j that were heard
    for word in first:
        best = row + unit + 1
        best[1:] = np.minimum(best[1:], row[:-1] + unit * (second != word))
        row = np.minimum.accumulate(best - inserted) + inserted
    errors, gaps = divmod(int(row[-1]), unit)
    missing = len(said) - len(heard)  # deletions less insertions
    return errors - gaps, (gaps + missing) // 2, (gaps - missing) // 2


def read_transcripts(path, option="transcripts"):
    """A .jsonl of {"name", "text"} or lines of name<TAB>text -> list of Transcripts.

    A .jsonl may say the `system`, else it is the model. Log-probability and number of tokens of each text, under any text LM, are
    keys `log_probability` (nats) and `tokens`, or two more columns; all lines have them, or none.
    Raises: FileNotFoundError, or ValueError that names the line.
    """
    path, found = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"--{option}={path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".jsonl":
                row = json.loads(line)
                system, name, text = row.get("system", "model"), row["name"], row["text"]
                nats, tokens = row.get("log_probability"), row.get("tokens")
            else:
                system, (name, text, *numbers) = "model", line.split("\t")
                nats, tokens = map(float, numbers[:2]) if numbers else (None, None)
            if ({*map(type, (name, text, system))} != {str} or (nats is None) != (tokens is None)
                    or (nats is not None and not (nats <= 0 < tokens))):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: expected name and text, and either nothing more or log_probability (nats, "
                             'at most 0) and tokens; as {"name": ..., "text": ...} in a .jsonl, else divided by tabs') from None
        found.append(Transcript(system, name, text, None if nats is None else (nats, tokens)))
    if not found:
        raise ValueError(f"{path} holds no transcripts")
    if len({each.scored is None for each in found}) > 1:
        raise ValueError(f"{path}: some transcripts have a log_probability and some have none; give all or none")
    return found


def read_references(path):
    """What was said, in a file as read_transcripts takes it -> {name of the document, without folder and ending: text}."""
    found, texts = read_transcripts(path, "references"), {}
    for each in found:
        name = Path(each.name).name
        if texts.setdefault(name, each.text) != each.text:
            raise ValueError(f"{path} has two texts of {name}; each recording needs a name of its own, whatever its folder")
    return {Path(name).stem: text for name, text in texts.items()} | texts  # a name without an ending may have a dot


def parse_command(command):
    """A command line -> its words, one of them with a PLACE. Raises: ValueError if there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"--recognise={command}: {str(error).lower()}; quote its words as for a shell") from None
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"--recognise={command}: no program {words[0] if words else ''!r} is here; give a command line that "
                         "prints the transcript of a wav, as docs/evaluation.md shows")
    return words if any(map(PLACE.search, words)) else [*words, "{}"]


def hear(words, path):
    """One recording -> (its transcript, "") or (None, why there is none)."""
    try:
        done = subprocess.run([PLACE.sub(lambda _: str(path), word) for word in words], stdin=subprocess.DEVNULL,
                              capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return None, f"nothing came within {PATIENCE} s"
    except OSError as error:
        raise ValueError(f"--recognise: {words[0]} cannot be run: {config.sentence(error)}") from None
    if done.returncode:
        return None, f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing was said of why'])[-1]}"
    return done.stdout.strip(), ""


def recognise(command, paths, workers=0):
    """Transcripts of wavs by a command, so many at once (0: one a core): a list with None for those that failed.

    What failed is said on screen, and the others go on. Raises: ValueError if there is no such command, or all failed.
    """
    words, found = parse_command(command), []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(workers or cores)
    try:
        heard = pool.map(lambda path: hear(words, path), paths)
        for path, (text, why) in zip(paths, config.progress(heard, total=len(paths), desc="recognising", unit="recording")):
            found.append(text)
            if text is None:
                print(f"{path} was not recognised: {why}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    if paths and found.count(None) == len(paths):
        raise ValueError(f"--recognise={command} failed for each of {len(paths)} recordings; for {path}: {why}")
    return found


def open_tokenizer(folder, name, file=None):
    """What a text LM reads: what its token is called, and a function from a text to its ids (T,), as a list.

    They begin with the beginning token that config.json names, which is given and not scored; where it names none, the first
    token of the text is not scored. Tokens are bytes where the config says so, else those of `file`, or of the folder's
    tokenizer.json, by the package tokenizers; special tokens that it would add are left out. name: the folder to the user.

    Raises: FileNotFoundError or ValueError that says what is missing.
    """
    settings = read_settings(folder)
    lm_architecture(settings, folder)  # what is wrong with the rest shows here, too
    check_values(settings, {"offset": int, "tokenizer_recipe": dict}, folder)
    rows, bos = settings["vocab_size"], settings.get("bos_token_id")
    begin = [bos] if type(bos) is int and 0 <= bos < rows else []
    if file is None and (settings.get("tokenizer_recipe") or {}).get("kind") == "bytes":
        return "byte", lambda text: begin + [settings.get("offset", 0) + byte for byte in text.encode()]
    path = Path(file or Path(folder, "tokenizer.json"))
    if not path.is_file():
        raise FileNotFoundError(f"--text-lm={name} reads tokens, and there is no {path}: copy the tokenizer.json that belongs to "
                                "it there, or name it with --text-tokenizer")
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError(f"{path} is read by the package tokenizers, which is not here: pip install tokenizers")
    if not isinstance(read_json(path).get("model"), dict):
        raise ValueError(f"{path} is no tokenizer.json: it has no `model`; copy it from where the text LM is from")
    import tokenizers  # optional, and slow to import
    tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def ids_of(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= rows:
            raise ValueError(f"{path} has a token {max(ids)}, --text-lm={name} has {rows} rows: they do not belong together")
        return begin + ids

    return f"token of {Path(name).name}", ids_of
