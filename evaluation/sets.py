"""Evaluation sets as they unzip -> lists of pairs. Folders and zip archives are read in place; nothing is re-laid or unpacked.

    lexical/SPLIT/gold.csv, *.wav       sWUGGY of sLM21    filename,id,voice,frequency,word,phones,length,correct
    syntactic/SPLIT/gold.csv, *.wav     sBLIMP of sLM21    filename,id,voice,type,subtype,transcription,correct
    sSC/, tSC/  N_STORY_correct.wav, N+1_STORY_incorrect.wav    Spoken StoryCloze; ms_sSC/SPEAKER/ of slamkit is a voice each
    swuggy_inter/, swuggy_oov/, sblimp/ slamkit's: the integer before _ or + counts, 2i is the positive of 2i + 1
    bg_alignment/, ... (eight parts)    SALMon             *_INDEX_*.wav, of each index the first name is the positive
    NAME/pairs.csv, NAME/units/         ours               positive,negative,voice,type and more columns, see below

pairs.csv: `positive` and `negative` name documents of the unit shards in units/ (UnitShards), or, where there is no units/,
recordings relative to the folder. All other columns are optional. `voice`. `item`: rows with the same are one question asked in
several voices (default: each row is a question). `positive_start`, `negative_start`: seconds at which the ending begins, for
--score=ending. Every further column (type, frequency, condition, ...) labels the pair for a breakdown; `frequency` as a whole
number becomes a band. The task is the beginning of the folder's name: swuggy, sblimp, sstorycloze, tstorycloze; else pairs.

Sources: sLM21, Nguyen et al. 2020 (arXiv 2011.11588); Spoken StoryCloze, TWIST (arXiv 2305.13009); SALMon, Maimon et al. 2024.
"""
import csv
import io
import itertools
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoints import archive
from checkpoints.recognise import recognise

TASKS = ("swuggy", "sblimp", "sstorycloze", "tstorycloze", "salmon", "pairs")
SALMON = ("bg_alignment", "bg_all_consistency", "bg_domain_consistency", "gender_consistency", "rir_consistency",
          "sentiment_alignment", "sentiment_consistency", "speaker_consistency")
GOLD = {  # the archive's folder and the columns that are needed of its gold.csv, by task; further columns do no harm
    "swuggy": ("lexical", ("filename", "id", "voice", "frequency", "correct")),
    "sblimp": ("syntactic", ("filename", "id", "voice", "type", "subtype", "correct"))}
BANDS = ("out of vocabulary", "1-4", "5-19", "20-99", ">=100")  # how often LibriSpeech has a word, as the official scorer cuts it
STORIES = ("sstorycloze", "tstorycloze")
MOST_MISSING = 0.01  # of the pairs; more is an incomplete copy


@dataclass(frozen=True)
class Pair:
    positive: str  # path of the recording, possibly into a zip, or name of the document
    negative: str
    item: str  # the question; recordings of it in several voices are averaged before questions are
    voice: str = ""
    labels: dict = field(default_factory=dict)  # what it can be broken down by: type, frequency, ...
    starts: tuple = (None, None)  # seconds at which the endings begin, where the benchmark says so


@dataclass(frozen=True)
class Benchmark:
    task: str  # one of TASKS
    name: str  # where it was found, e.g. lexical/dev
    split: str  # dev, test, or empty
    pairs: tuple
    units: str | None = None  # folder of unit shards that holds the documents; None: recordings
    row_order: tuple = ()  # sBLIMP: (positive, negative) as the official scorer pairs them, by the order of the rows
    stems: dict = field(default_factory=dict)  # {path: stem} of every recording that a ZeroSpeech submission lists
    present: frozenset = frozenset()  # the recordings that exist


def scan(root):
    """{folder: {file name: path}} of everything below root; a zip counts as a folder of its name. Paths are text."""
    if not root.exists():
        raise FileNotFoundError(f"--data={root}: no such file or folder; give the folder or zip of an evaluation set")
    folders, zips = defaultdict(dict), []
    if root.is_file():
        zips = [root]
    for folder, names in archive.walk(root) if root.is_dir() else ():
        for name in names:
            if name.lower().endswith(".zip"):
                zips.append(folder / name)
            else:
                folders[folder][name] = os.path.join(folder, name)
    for packed in sorted(zips):
        for name in archive.names_in(packed):
            path = packed / name
            if not name.startswith("__MACOSX") and not name.endswith("/") and not path.name.startswith("."):
                folders[path.parent][path.name] = str(path)
    return dict(folders)


def read_rows(path, needed):
    """A table with a header, inside a zip too -> list of dictionaries. Raises ValueError that names the columns it lacks."""
    with archive.open_file(path) as file:
        content = file.read()
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of comma-separated values in UTF-8 ({error}); copy it again") from None
    header = [name.strip() for name in rows[0]] if rows else []
    lacking = [name for name in needed if name not in header]
    if lacking:
        raise ValueError(f"{path} has the columns {', '.join(header) or 'of an empty file'}, and not {', '.join(lacking)}; "
                         f"expected at least {','.join(needed)}")
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} values for {len(header)} columns; copy the file again")
    return [dict(zip(header, row)) for row in rows[1:] if row]


def paths_of(folder):
    """Absolute paths of a folder: as it was called, and where links lead. Either name may say what it is."""
    return Path(os.path.abspath(folder)), Path(folder).resolve()


def display(folder, root):
    """How a result calls a folder: its path from --data on, which itself gives its last name."""
    inside = Path(folder).relative_to(root).as_posix()
    return root.resolve().name + ("" if inside == "." else f"/{inside}")


def wavs_of(files):
    return {name: path for name, path in files.items() if name.lower().endswith((".wav", ".flac"))}


# ---------------------------------------------------------------------------------------------- sLM21

def frequency_labels(text, where):
    """The `frequency` column -> labels; an empty one says nothing."""
    try:
        frequency = float(text.strip() or "nan")  # a table once handled by pandas says 3.0
    except ValueError:
        raise ValueError(f"{where}: frequency {text!r}; expected a whole number or nothing") from None
    if frequency != frequency:
        return {}
    band = BANDS[sum(frequency >= first for first in (1, 5, 20, 100))]
    return {"vocabulary": "in vocabulary" if frequency > 0 else "out of vocabulary", "frequency": band}


def read_gold(task, folder, files, name, split):
    """One folder of sLM21. A word and its non-word are joined by (voice, id), sentences by (type, subtype, voice, id)."""
    where, rows = Path(folder, "gold.csv"), read_rows(files["gold.csv"], GOLD[task][1])
    keys = ("id",) if task == "swuggy" else ("type", "subtype", "id")
    sides, stems = {"1": {}, "0": {}}, {}
    for row in rows:
        stem = row["filename"].removesuffix(".wav")
        row["path"] = files.get(f"{stem}.wav") or str(Path(folder, f"{stem}.wav"))
        stems[row["path"]] = stem
        side, key = row["correct"].strip().removesuffix(".0"), ("/".join(row[key] for key in keys), row["voice"])
        if side not in sides:
            raise ValueError(f"{where}: {stem} has correct={row['correct']!r}; expected 1 or 0")
        if key in sides[side]:
            raise ValueError(f"{where}: {stem} and {sides[side][key]['filename']} both have correct={side} for {key[0]} in "
                             f"voice {key[1]}; expected one of each")
        sides[side][key] = row
    right, wrong = sides.values()
    for (mine, ones), (theirs, others) in itertools.permutations([("right", right), ("wrong", wrong)]):
        for item, voice in ones:
            if (item, voice) not in others:
                voices = ", ".join(sorted(other for its, other in others if its == item))
                raise ValueError(f"{where}: {item} has its {mine} one in voice {voice}, "
                                 + (f"its {theirs} one only in {voices}; a pair must be of one voice" if voices else
                                    f"and no {theirs} one at all; copy the file again"))
    pairs = []
    for (item, voice), row in right.items():
        other = wrong[item, voice]
        labels = (frequency_labels(row["frequency"] or other["frequency"], f"{where}, {row['filename']}") if task == "swuggy"
                  else {"type": row["type"], "subtype": row["subtype"]})
        pairs.append(Pair(row["path"], other["path"], item, voice, labels))
    # right and wrong stand in the order of the rows, by which the official scorer of sBLIMP pairs them
    order = tuple((a["path"], b["path"]) for a, b in zip(right.values(), wrong.values())) if task == "sblimp" else ()
    return Benchmark(task, name, split, tuple(pairs), row_order=order, stems=stems)


def find_gold(task, folders, root, split, required):
    """All folders of sLM21 for a task. root itself may be lexical/dev. required: explain what is wrong instead of passing by."""
    (kind, columns), found, others = GOLD[task], [], set()
    for folder, files in folders.items():
        official, here = next((place for place in paths_of(folder) if place.parent.name == kind), None), folder == root
        if official and official.name != split:
            others.add(official.name)
        elif "gold.csv" in files:
            if official or here and all(row.keys() >= {*columns} for row in read_rows(files["gold.csv"], ("filename",))[:1]):
                name = "/".join((official or folder.resolve()).parts[-2:]) if here else display(folder, root)
                found.append(read_gold(task, folder, files, name, split if official else ""))
        elif official and wavs_of(files):
            raise ValueError(f"{folder} has recordings but no gold.csv, so nothing says which are pairs: this is the archive of "
                             "the 2021 challenge (zerospeech2021-dataset.zip). Get sLM21-dataset, which has it (zrc "
                             "datasets:pull sLM21-dataset), or put its gold.csv there")
    if required and not found and others:
        raise ValueError(f"--split={split}: {root} has {kind}/{', '.join(sorted(others))} only")
    return found


# ---------------------------------------------------------------------------------------------- pairs by the names of files

def numbered_pairs(wavs, mark):
    """Names that begin with an integer and `mark` -> {item: (positive, negative)}, names; None for a partner that is absent.

    2i and 2i + 1 belong together, or 2i - 1 and 2i where only that leaves none alone. Returns None if a name has no integer.
    """
    numbers = {}
    for name in wavs:
        number = name.partition(mark)[0]
        if mark not in name or not (number.isascii() and number.isdigit()) or int(number) in numbers:
            return None
        numbers[int(number)] = name

    def paired(first):
        pairs = [(numbers.get(n), numbers.get(n + 1)) for n in sorted({n - (n - first) % 2 for n in numbers})]
        return {a or b: (a, b) for a, b in pairs}

    return min(paired(0), paired(1), key=lambda pairs: any(None in pair for pair in pairs.values()))


def story_pairs(wavs):
    """Names that end in _correct and _incorrect -> {story: (positive, negative)}; None where one is absent.

    The story is what stands between a leading integer and that ending. Names that do not say it are paired by their integers.
    """
    stories = defaultdict(dict)
    for name in wavs:
        match = re.fullmatch(r"(?:\d+_)?(.+)_(correct|incorrect)", Path(name).stem)
        if match is None or match[2] in stories[match[1]]:
            break
        stories[match[1]][match[2]] = name
    else:
        if any(len(sides) == 2 for sides in stories.values()):
            return {story: (sides.get("correct"), sides.get("incorrect")) for story, sides in stories.items()}
    numbered = numbered_pairs(wavs, "_")
    if numbered is None:
        return None
    turned = [(b, a) if (a or "").rpartition("_")[2].startswith("incorrect") else (a, b) for a, b in numbered.values()]
    return {str(i): pair for i, pair in enumerate(turned)}


def salmon_pairs(wavs):
    """Names whose second field between _ is the sample: of each, the first in the alphabet is the positive."""
    samples = defaultdict(list)
    for name in sorted(wavs):
        fields = Path(name).stem.split("_")
        if len(fields) < 2:
            return None
        samples[fields[1]].append(name)
    if any(len(names) > 2 for names in samples.values()):
        return None
    return {sample: tuple([*names, None][:2]) for sample, names in samples.items()}


NAMED = {  # task whose names of files say the pairs -> how; what a folder inside of the benchmark is, empty: nothing
    "swuggy": (lambda wavs: numbered_pairs(wavs, "_"), "folder"), "sblimp": (lambda wavs: numbered_pairs(wavs, "+"), "type"),
    **dict.fromkeys(STORIES, (story_pairs, "voice")), "salmon": (salmon_pairs, "")}


def by_names(task, name, places):
    """A Benchmark of folders whose file names say the pairs. places: [(folder, its path in the benchmark, {file name: path})]."""
    pairs, (pairing, label) = [], NAMED[task]
    for folder, part, wavs in places:
        found = pairing(wavs)
        if found is None:
            raise ValueError(f"{folder}: the names do not say which recordings are pairs, e.g. {sorted(wavs)[0]}; see the head "
                             "of evaluation/sets.py for the layouts, or write a pairs.csv")
        for item, (a, b) in found.items():
            paths = [str(Path(folder, one or f"partner_of_{other}")) for one, other in ((a, b), (b, a))]
            pairs.append(Pair(*paths, item, part) if label == "voice" else
                         Pair(*paths, f"{part}/{item}", labels={label: part} if label and part else {}))
    return Benchmark(task, name, "", tuple(pairs))


def find_named(task, folders, root):
    """Benchmarks whose folder's name says what they are, and the recordings' names the pairs."""
    groups, official = defaultdict(list), {kind for kind, _ in GOLD.values()}
    for folder, files in folders.items():
        wavs, around = wavs_of(files), [folder, *folder.parents]
        around = around[:around.index(root) + 1]  # the folder itself and those around it, up to --data
        tables = any(table in folders.get(place, ()) for place in around for table in ("gold.csv", "pairs.csv"))
        if not wavs or tables or any(place.parent.name in official for place in paths_of(folder)):
            continue
        named = ((place, known) for place in around for known in NAMED for path in paths_of(place)
                 if names_task(known, re.sub(r"\.zip$", "", path.name, flags=re.IGNORECASE)))
        place, known = next(named, (None, None))  # the innermost folder with a telling name decides
        if known == task:
            groups[place].append((folder, "" if folder == place else folder.relative_to(place).as_posix(), wavs))
    return [by_names(task, display(place, root), places) for place, places in groups.items()]


def names_task(task, words):
    """Whether a folder's name says that it holds this task."""
    words = words.casefold()
    if words.startswith("cross_"):  # text and speech mixed: not for models of speech alone
        return False
    if task in STORIES:
        return re.search(rf"(^|[^a-z]){task[0]}[-_]?(sc|storycloze)($|[^a-z])", words) is not None
    return words in SALMON if task == "salmon" else words.startswith(task)


# ---------------------------------------------------------------------------------------------- ours

def read_pairs(task, folder, files, name):
    """A folder with pairs.csv."""
    where, units = Path(folder, "pairs.csv"), Path(folder, "units")
    units = str(units) if (units / "meta.json").is_file() else None
    pairs = []
    for number, row in enumerate(read_rows(files["pairs.csv"], ("positive", "negative")), start=2):
        sides = [row.pop(side) if units else str(Path(folder, row.pop(side))) for side in ("positive", "negative")]
        try:
            starts = tuple(float(text) if text else None for text in (row.pop(f"{side}_start", "") for side in
                                                                      ("positive", "negative")))
        except ValueError:
            raise ValueError(f"{where}, line {number}: expected seconds in positive_start and negative_start") from None
        voice, item = row.pop("voice", ""), row.pop("item", "") or str(number)
        frequency = frequency_labels(row["frequency"], f"{where}, line {number}") if row.get("frequency", "").isdecimal() else {}
        pairs.append(Pair(*sides, item, voice, {key: value for key, value in {**row, **frequency}.items() if value}, starts))
    return Benchmark(task, name, "", tuple(pairs), units=units)


def find_pairs(task, folders, root):
    found = []
    for folder, files in folders.items():
        if "pairs.csv" in files:
            words = [place.name.casefold().replace("-", "").replace("_", "").removeprefix("mini") for place in paths_of(folder)]
            own = next((known for name in words for known in TASKS if name.startswith(known)), "pairs")
            if own == task or (task == "pairs" and folder == root):
                found.append(read_pairs(task, folder, files, display(folder, root)))
    return found


def find(task, root, split="dev", voices=()):
    """All benchmarks of a task below a folder or zip, or of every task where task is `all`.

    Raises: FileNotFoundError for no such folder; ValueError if there is none, one is empty, or its files contradict themselves.
    """
    root = Path(root)
    folders, found = scan(root), []
    for each in TASKS if task == "all" else (task,):
        if each in GOLD:
            found += find_gold(each, folders, root, split, required=task != "all")
        found += find_named(each, folders, root) + find_pairs(each, folders, root)
    if not found and task in STORIES:  # the folder's name does not say which, but the user does
        telling = [(folder, "" if folder == root else display(folder, root), wavs_of(files))
                   for folder, files in folders.items() if any(re.search(r"_(in)?correct\.", name) for name in files)]
        others = [name for name in STORIES if name != task and any(names_task(name, str(place)) for place in paths_of(root))]
        if telling and not others:
            found = [by_names(task, root.resolve().name, telling)]
    if not found:
        seen = ", ".join(sorted({display(folder, root) for folder in folders})[:6]) or "nothing"
        raise ValueError(f"--task={task}: no such evaluation set in {root}" + (
            f", which {said}" if (said := recognise(root)) else
            f" (found {seen}); the head of evaluation/sets.py shows the layouts"))
    for benchmark in found:
        if not benchmark.pairs:
            raise ValueError(f"{benchmark.name} in {root} is empty: it lists no pairs; copy it again")
    paths = frozenset(path for files in folders.values() for path in files.values())
    return [only_voices(replace(benchmark, present=paths), voices) for benchmark in found]


def only_voices(benchmark, voices):
    if not voices:
        return benchmark
    known = {pair.voice for pair in benchmark.pairs}
    unknown = [voice for voice in voices if voice not in known]
    if unknown:
        raise ValueError(f"--voices: {benchmark.name} has no voice {unknown[0]}, only "
                         f"{', '.join(sorted(known - {''})) or 'recordings of voices without a name'}")
    pairs = tuple(pair for pair in benchmark.pairs if pair.voice in voices)
    kept = {path for pair in pairs for path in (pair.positive, pair.negative)}
    return replace(benchmark, pairs=pairs, row_order=tuple(pair for pair in benchmark.row_order if kept.issuperset(pair)))


def complete_pairs(benchmark, usable):
    """The pairs of which both recordings are usable, and a sentence about the others.

    Args: usable: set of paths or names.
    Returns: pairs; names of what is missing; sentence, empty if nothing is.
    Raises: ValueError if more than 1 % of the pairs would be left out.
    """
    pairs = [pair for pair in benchmark.pairs if pair.positive in usable and pair.negative in usable]
    missing = sorted({name for pair in benchmark.pairs for name in (pair.positive, pair.negative)} - usable)
    left_out, total = len(benchmark.pairs) - len(pairs), len(benchmark.pairs)
    if not left_out:
        return pairs, missing, ""
    named = ", ".join([*missing[:3], *["..."] * (len(missing) > 3)])
    sentence = (f"{len(missing)} recordings are missing or cannot be encoded ({named}): {left_out} of {total} pairs left out "
                f"({left_out / total:.2%})")
    if left_out > MOST_MISSING * total:
        raise ValueError(f"{benchmark.name}: {sentence}, more than {MOST_MISSING:.0%}; copy the evaluation set again")
    return pairs, missing, sentence
