"""The rating page: listeners say how natural and meaningful speech is, or which of two they prefer; one static page a rater.

    python -m pages rate --systems=twist=samples/twist,cold=samples/cold,original=speech --raters=10 --per-rater=40
    python -m pages rate --systems=twist=samples/twist,cold=samples/cold --kind=preference --inline
    python eval.py --task=mmos --data=ratings/            # reads what came back (evaluation/opinion.py)

    {system: folder} --match--> {prompt: {system: recording}} --plan--> study.json: who hears what, in which order
                     --level, code--> sounds/CODE.flac        --page--> rater_01.html, rater_02.html, ...

A page and its sounds say nothing of the systems: sounds are made anew, without the comment that a recording may have, at one
loudness, under codes; study.json alone knows them, and stays at home. docs/rating.md says what the paper had and what is ours.
"""
import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import config
from checkpoints import files
from evaluation.study import plan
from pages import html
from speech.audio import SAMPLE_RATE, read_wav

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
MADE = re.compile(r"(?:(_\d+)?_(?:resynth|respoken|original|continuation)|(_\d+))(?:-\d+)?$")  # what sample.py adds
NUMBER = re.compile(r"_\d+$")
LOUDEST = 0.99  # of a sample
QUESTION = {"opinion": "How natural and meaningful is this speech?",
            "preference": "Which of the two is more natural and meaningful?"}
ANSWERS = {  # this wording, and that of TOLD, is ours: the paper's was not at hand
    "opinion": {5: "wholly: a person could have said this, and it makes sense", 4: "mostly", 3: "partly", 2: "little",
                1: "not at all: it sounds like no person, or makes no sense"},
    "preference": {"A": "A is better", "B": "B is better", "neither": "neither is better"}}
TOLD = ("You will hear short pieces of speech, {}. Judge two things together: {} like a person speaking, and {} what is said "
        "make {}sense, from its beginning to its end? A piece may break off at its end; that does not count against it.")
HEARD = {"opinion": ("one at a time", "does it sound", "does", ""),
         "preference": ("in pairs, A and B, that begin alike", "which sounds more", "in which does", "more ")}


@dataclass(frozen=True)
class RateConfig:
    systems: tuple[str, ...] = ()  # NAME=FOLDER of each, divided by commas; recordings of one prompt are matched by their names
    raters: int = 10  # pages that are made
    per_rater: int = 40  # clips (preference: pairs) that each rates, besides practice and catch clips
    out: str = "ratings"  # folder for the pages, sounds/ and study.json
    kind: str = "opinion"  # opinion: 1 to 5 for each clip | preference: which of two
    undecided: bool = True  # preference: the answer that neither is better is allowed
    practice: int = 2  # clips before the first that counts
    catch: int = 3  # clips whose right answer is known: a number that the page asks for, and noise, in turn
    catch_misses: int = 1  # of a rater's catch clips that may be answered wrongly; who misses more is left out
    level: float | None = -26.0  # average power of every clip, dB below full scale; none: as they are recorded
    seed: int = 0  # of all that is drawn: the same seed and recordings give the same study
    inline: bool = False  # sounds inside the pages, which then can be sent alone
    CHOICES = {"kind": ("opinion", "preference")}
    RANGES = {"raters": (1, 10_000), "per_rater": (1, 10_000), "level": (-60, 0), "practice": (0, 100), "catch": (0, 100)}
    NEEDS = {"undecided": "kind=preference", "catch_misses": "catch"}


# ---------------------------------------------------------------------------------------------- which recordings

def folders_of(systems):
    """NAME=FOLDER texts -> {name: folder}. Raises: ValueError for fewer than two, what is given twice, and no folder."""
    pairs = [system.partition("=")[::2] for system in systems]
    found = {name.strip(): Path(folder).expanduser() for name, folder in pairs}
    if len(found) < 2 or len(found) < len(pairs) or len({folder.resolve() for folder in found.values()}) < len(found):
        raise ValueError(f"--systems={','.join(systems)}: expected two systems or more, NAME=FOLDER,NAME=FOLDER, each with a "
                         "name and a folder of its own")
    for name, folder in found.items():
        if not name or not folder.is_dir():
            raise ValueError(f"--systems: {name}={folder} is no name with a folder of recordings; write NAME=FOLDER")
    return found


def match(folders):
    """{system: folder} -> {prompt: {system: path}}, and a sentence about what each system has that is not rated.

    A prompt is a name that every system has: the stem, without what sample.py puts behind it (_resynth, -2, ...). The number of a
    continuation counts among systems that have one: a_0 meets a_0, a and a_resynth, never a_1; and where a system has but one
    recording of a, a further a_1 is left out.
    """
    found, everything, prompts, used = {}, {}, {}, set()
    for system, folder in folders.items():
        everything[system] = sorted((path for path in folder.rglob("*") if path.suffix.lower() in AUDIO and path.is_file()),
                                    key=lambda path: (len(path.stem), str(path)))
        found[system] = {MADE.sub(r"\1\2", path.stem): path for path in reversed(everything[system])}  # the first of a name
    for name in sorted(set().union(*found.values()), key=lambda name: (len(name), name)):
        paths = {system: named.get(name) or named.get(NUMBER.sub("", name)) for system, named in found.items()}
        if all(paths.values()) and not used & {*paths.values()}:
            prompts[name], used = paths, used | {*paths.values()}
    left = {system: [path.name for path in paths if path not in used] for system, paths in everything.items()}
    return prompts, [f"{system}: {len(names)} of {len(everything[system])} recordings are left out, which another system lacks, "
                     f"or which are further ones of a prompt: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
                     for system, names in left.items() if names]


# ---------------------------------------------------------------------------------------------- sounds and pages

def sound_of(path, noise, level, seed):
    """Samples (S,) of a recording at a level; noise: of its average spectrum instead, in which nothing is said."""
    wav = read_wav(path)
    if noise:
        power = torch.fft.rfft(wav).abs()
        phase = 2 * torch.pi * torch.rand(len(power), generator=torch.Generator().manual_seed(seed))
        wav = torch.fft.irfft(torch.polar(power, phase), len(wav))
    if level is not None:
        wav = wav * 10 ** (level / 20) / wav.square().mean().sqrt().clamp(min=1e-8)
    return wav * min(1.0, LOUDEST / max(float(wav.abs().max()), LOUDEST))


def body_of(kind, undecided, count):
    """The page without its clips, which the script puts in one after the other. Ids are those that rating.js knows."""
    keys = {value: value if kind == "opinion" else number for number, value in enumerate(ANSWERS[kind], start=1)}
    scale = "".join(f'<label><input type="radio" name="answer" value="{value}" id="answer-{value}" data-key="{keys[value]}">'
                    f"<kbd>{keys[value]}</kbd> {html.escape(text)}</label>"
                    for value, text in ANSWERS[kind].items() if undecided or value != "neither")
    listen = "Space plays and pauses" + ("" if kind == "opinion" else ", A and B play that one")
    return f"""<noscript><p>This page needs JavaScript, to note your answers. Nothing leaves your machine.</p></noscript>
<section id="intro" hidden><p>{TOLD.format(*HEARD[kind])}</p>
<p>Wear headphones, in a quiet room. There are {count}. An answer can be given once a piece was heard to its end; it may be heard
again, and you can go back and change an answer. Now and then a sentence on the page asks for a certain answer: please follow it.
The first ones are for practice and do not count.</p>
<p class="keys">{listen}, a digit answers, Enter goes on. Your answers stay in this browser until you send the file that you get
at the end; the wording of the question is that of this study's makers.</p>
<button id="start">Begin</button></section>
<section id="trial" hidden><h2 id="progress" tabindex="-1"></h2><p id="ask" hidden></p><div id="players"></div>
<fieldset id="scale"><legend>{QUESTION[kind]}</legend>{scale}</fieldset>
<p id="status" class="soft" role="status"></p><p><button id="back">Back</button> <button id="next">Next</button></p>
<p><button id="stop" class="soft">Stop here and save what there is</button></p></section>
<section id="finish" hidden><h2 id="done" tabindex="-1"></h2>
<p><button id="download">Save the file to send back</button> <button id="review">Back to the clips</button></p>
<p><label for="copy">Where saving does not work, copy this text and send it:</label>
<textarea id="copy" readonly rows="6" spellcheck="false"></textarea></p></section>
<p id="storage" class="notes" role="status"></p>"""


def main(argv=None):
    options = config.load(RateConfig, argv)
    folders = folders_of(options.systems)
    prompts, notes = match(folders)
    raters, apart = plan(options, list(folders), list(prompts))
    heard = sorted({(system, each["prompt"], noise) for items in raters.values() for each in items
                    for system, noise in each["heard"]})
    codes = random.Random(f"{options.seed} codes").sample(range(2**32), len(heard))
    codes, sounds, clips, out = {clip: f"{code:08x}" for clip, code in zip(heard, codes)}, {}, {}, Path(options.out)
    for (system, prompt, noise), code in config.progress(codes.items(), desc="sounds", unit="clip"):
        wav = sound_of(prompts[prompt][system], noise, options.level, options.seed)
        sounds[code] = html.flac(wav)
        clips[code] = {"system": system, "prompt": prompt, "noise": noise, "seconds": round(len(wav) / SAMPLE_RATE, 2),
                       "sha256": hashlib.sha256(sounds[code]).hexdigest()}
    design = {rater: [{"role": each["role"], "clips": [codes[system, each["prompt"], noise] for system, noise in each["heard"]],
                       **{key: each[key] for key in ("accept", "ask") if key in each}} for each in items]
              for rater, items in raters.items()}
    study = {"kind": options.kind, "systems": list(folders), "prompts": list(prompts), "misses": options.catch_misses,
             "question": QUESTION[options.kind], "answers": ANSWERS[options.kind], "clips": clips, "raters": design}
    name, known = hashlib.sha256(json.dumps(study).encode()).hexdigest()[:12], out / "study.json"
    if known.exists() and f'"study": "{name}"' not in known.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{known} is another study, which its raters' files belong to; give another --out")
    files.write_text(known, json.dumps({"study": name, **study, "options": asdict(options)}, indent=1) + "\n")
    for code, content in sounds.items() if not options.inline else ():
        files.write_bytes(out / "sounds" / f"{code}.flac", content)
    for rater, items in design.items():
        data = {"study": name, "rater": rater, "kind": options.kind, "items": [
            {"clips": each["clips"], "practice": each["role"] == "practice", "ask": each.get("ask"),
             "sounds": [html.data_address("audio/flac", sounds[code]) if options.inline else f"sounds/{code}.flac"
                        for code in each["clips"]]} for each in items]}
        body = body_of(options.kind, options.undecided, f"{len(items)} {'pieces' if options.kind == 'opinion' else 'pairs'}")
        files.write_text(out / f"{rater}.html", html.document("How does it sound?", body, "rating", data))
    if not apart and options.practice + options.catch:
        notes.append("practice and catch clips are of prompts that are rated, too, as there are no more prompts")
    lasts = {system: [clip["seconds"] for clip in clips.values() if clip["system"] == system] for system in folders}
    notes.append("seconds on average: " + ", ".join(f"{system} {sum(each) / len(each):.1f}"
                                                    for system, each in lasts.items() if each))
    print("".join(f"{note}\n" for note in notes) + f"{len(raters)} pages, {options.per_rater} of {len(prompts)} prompts each: "
          f"{out}/rater_01.html ...\nsend each rater one page" + f" and {out}/sounds" * (not options.inline)
          + f", never study.json, which tells the systems; python eval.py --task=mmos --data={out} reads what comes back")
