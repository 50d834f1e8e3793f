"""The pocket benchmarks: right against wrong, spoken by two voices that nothing was trained on, stored as units.

    mini-swuggy        a word of the stories               | a non-word of as many phonemes, each next to neighbours it has there
    mini-sblimp        a sentence of the stories           | with the other verb form, the other pronoun, or two words swapped
    mini-sstorycloze   a story of a cause and its effect   | the same story with the effect of another cause
    mini-tstorycloze   a story and its ending              | the same story with the ending of another one

    question --espeak-ng, afresh each time--> recordings --pocket HuBERT--> units --fits the window? keeps the balance?--> pairs

Nothing is to be won by counting units: a question that would leave the right side the shorter one more often than the longer one
(or the reverse), by more than a pair or two, is put aside. Of several non-words for a word, the one is taken that keeps this
balance and that of phoneme bigrams best. Words and sentences are spoken by both voices, stories by one of them in turn.

NAME/pairs.csv and NAME/units/ are what eval.py reads (see evaluation/sets.py); NAME/texts.csv says what was spoken, a row a
question. A benchmark that exists is skipped: delete its pairs.csv to make it again.
Needs `apt install espeak-ng wamerican`; the word list keeps words of English that the stories lack from passing as non-words.

    python -m pocket.pairs                                       # the bundled ones
    python -m pocket.pairs --out=build/few --count=6
    python -m pocket.pairs --recordings=build/benchmarks         # the same spoken again, as recordings, for other tokenizers

Sources: sWUGGY and sBLIMP, Nguyen et al. 2020 (arXiv 2011.11588); Spoken StoryCloze, TWIST (arXiv 2305.13009), section 4.
"""
import csv
import functools
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import count as naturals
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import soundfile

import config
import twist
from checkpoints import files
from corpus.shards import check_recipe, write_shards
from evaluation.sets import read_rows
from hubert_units import load_unit_encoder
from kernels.packed import packed
from pocket import stories
from pocket.speech import HELD_OUT_VOICES, Espeak
from speech.audio import SAMPLE_RATE
from speech.encoder import deduplicate

LONGEST_TEXT = 165  # characters of a story: most of longer ones do not fit the window
ENGLISH = Path("/usr/share/dict/words")  # none of their sounds is a non-word
FEWEST_PHONEMES = 4  # of a word: what differs in one phoneme from a shorter one is mostly a word too
TRIES = 300  # changes of a word that are looked at
VOWEL = re.compile(r"[',]?[aeiouAEIOU0@3V]")
EDGE = "#"  # what stands before the first and after the last phoneme


@dataclass(frozen=True)
class PairsConfig:
    out: str = "pocket/benchmarks"  # folder for the four benchmarks
    count: int = 300  # questions of each
    seed: int = 0  # of the choice of words, sentences and stories
    first_story: int = 10_000_000  # the stories that the speech LM heard, for the frequency of a word: seed of the first,
    spoken: int = 1300  # and how many
    recordings: str = ""  # folder: speak what --out asks again, and keep the recordings there, to be encoded by eval.py
    RANGES = {"count": (1, config.MOST), "spoken": (1, config.MOST)}


@dataclass(frozen=True)
class Question:
    item: str  # its name
    right: str
    wrong: str
    said: tuple = ()  # what espeak-ng is given for the two, where that is not the text
    kind: str = ""  # the column `type`
    frequency: str = ""  # how often the speech LM has heard the word
    tilt: int = 0  # +1: bigrams of phonemes prefer the right one, -1: the wrong one
    beginning: str = ""  # what both begin with


# ---------------------------------------------------------------------------------------------- words

def unstressed(phonemes):
    return tuple(phoneme.lstrip("',") for phoneme in phonemes)


class Phonotactics:
    """Which phonemes follow which in a vocabulary, a list of tuples of phonemes."""

    def __init__(self, vocabulary):
        self.known = {unstressed(word) for word in vocabulary}
        self.pairs = Counter(pair for word in vocabulary for pair in pairwise((EDGE, *word, EDGE)))
        self.firsts = Counter(first for (first, _), n in self.pairs.items() for _ in range(n))
        self.phonemes = sorted(phoneme for phoneme, n in self.firsts.items() if n >= 5 and phoneme != EDGE)

    def log_probability(self, word):
        """Under maximum likelihood bigrams; -inf if two neighbours never meet in the vocabulary."""
        logs = (math.log(self.pairs[pair] / self.firsts[pair[0]]) if self.pairs[pair] else -math.inf
                for pair in pairwise((EDGE, *word, EDGE)))
        return sum(logs)

    def replacements(self, phoneme):
        """Phonemes of the same sort: consonants, or vowels of the same stress."""
        def sort(p):
            return VOWEL.match(p) is not None, p[0] if p[0] in "'," else ""
        return [other for other in self.phonemes if sort(other) == sort(phoneme) and other != phoneme]

    def non_words(self, word, rng):
        """[(non-word, +1 or -1), ...]: one or two phonemes changed; two that bigrams find likelier, two less likely (+1)."""
        own, found = self.log_probability(word), {}
        for _ in range(TRIES):
            changed = list(word)
            for i in rng.sample(range(len(word)), rng.choice((1, 2))):
                changed[i] = rng.choice(self.replacements(word[i]) or [word[i]])
            likelihood = self.log_probability(changed)
            if unstressed(changed) not in self.known and likelihood > -math.inf:
                found[tuple(changed)] = own - likelihood
        nearest = sorted(found, key=lambda other: (abs(found[other]), other))
        sides = ([other for other in nearest if (found[other] > 0) == likelier] for likelier in (True, False))
        return [(other, tilt) for side, tilt in zip(sides, (1, -1)) for other in side[:2]]


def spelt(phonemes):
    """As espeak-ng reads phonemes; the bar keeps neighbours from being read as one."""
    return f"[[{'|'.join(phonemes)}]]"


def word_questions(options, engine):
    """Yields, for each word, the questions that it could be: [[Question], ...], one for each non-word."""
    rng = Random(f"words {options.seed}")
    if not ENGLISH.exists():
        raise FileNotFoundError(f"no list of English words at {ENGLISH}; `apt install wamerican`")
    english = [word for word in ENGLISH.read_text(encoding="utf-8").split() if word.isascii() and word.isalpha()]
    voice = HELD_OUT_VOICES[0][0]
    heard = Counter(re.findall(r"[a-z]+", " ".join(stories.text(options.first_story, options.spoken)).lower()))
    everything = sorted({*heard, *re.findall(r"[a-z]+", " ".join(stories.text(0, 4000)).lower())})  # names too
    sounds = {word: engine.phonemes(word, voice) for word in everything}
    phonotactics = Phonotactics([sounds[word] for word in stories.words()])
    phonotactics.known |= {unstressed(sound) for sound in sounds.values()}
    phonotactics.known |= {unstressed(engine.phonemes(word, voice)) for word in english}
    words = [word for word in stories.words() if len(sounds[word]) >= FEWEST_PHONEMES]
    for word in rng.sample(words, len(words)):
        yield [[Question(word, " ".join(sounds[word]), " ".join(other), (spelt(sounds[word]), spelt(other)),
                         frequency=str(heard[word]), tilt=tilt)] for other, tilt in phonotactics.non_words(sounds[word], rng)]


# ---------------------------------------------------------------------------------------------- sentences and stories

def sentence_questions(kind, options):
    """Yields twins of one kind, as a single choice: [[Question, Question]]."""
    for i in naturals():
        yield [[Question(f"{kind}_{i:04d}{side}", *pair, kind=kind)
                for side, pair in zip("ab", stories.pairs(kind, 2, f"{options.seed}.{i}"))]]


def story_questions(kind, options):
    """The same for stories with two endings, if they are short and differ in the last sentence only."""
    for i in naturals():
        twins = []
        for side, pair in zip("ab", stories.pairs(kind, 2, f"{options.seed}.{i}")):
            (*right, _), (*wrong, _) = map(stories.SENTENCE.split, pair)
            if right == wrong and max(map(len, pair)) <= LONGEST_TEXT:
                twins.append(Question(f"story_{i:05d}{side}", *pair, beginning=" ".join(right)))
        if len(twins) == 2:
            yield [twins]


# ---------------------------------------------------------------------------------------------- speech

class Studio:
    """Speaks questions and turns them into units."""

    def __init__(self):
        self.engine, self.encoder = Espeak(), load_unit_encoder()
        self.recipe = {**self.encoder.recipe, "dedup": True}
        model, vocab = twist.load_speech_lm()
        check_recipe(self.recipe, vocab.recipe, "pocket/hubert")
        self.heard = functools.lru_cache(maxsize=32)(self.hear)  # a word is compared with several non-words
        self.most = model.config.block_size - 2  # units beside a beginning and an ending token

    def hear(self, text, *manner):
        """A text in a voice -> (units, runs, seconds), phonemes with their times."""
        wav, phones = self.engine.say_afresh(text, *manner)
        return (*(part.numpy() for part in deduplicate(self.encoder.encode(wav))), len(wav) / SAMPLE_RATE), phones

    def record(self, question, voices):
        """Returns rows of pairs.csv and {name: (units, runs, seconds)}; None if a side does not fit or both are the same."""
        rows, documents = [], {}
        for voice, *manner in voices:
            row = {"voice": voice.partition("+")[2], "item": question.item}
            before = self.engine.say_afresh(question.beginning, voice, *manner)[1] if question.beginning else ()
            for side, text in zip(("positive", "negative"), question.said or (question.right, question.wrong)):
                row[side] = f"{question.item}_{row['voice']}_{side}"
                documents[row[side]], phones = self.heard(text, voice, *manner)
                if before:  # the same phonemes, and a last one for the end: in its place the ending begins
                    row[f"{side}_start"] = f"{phones[len(before) - 1][0]:.3f}"
            rows.append({**row, "type": question.kind, "frequency": question.frequency})
        fits = all(len(units) <= self.most for units, _, _ in documents.values())
        apart = all(not np.array_equal(documents[row["positive"]][0], documents[row["negative"]][0]) for row in rows)
        return (rows, documents) if fits and apart else None


def tilt_of(recorded):
    """How many more right sides are shorter than longer, over all rows of some questions."""
    return sum(int(np.sign(len(documents[row["negative"]][0]) - len(documents[row["positive"]][0])))
               for rows, documents in recorded for row in rows)


def balanced(choices, count, studio, in_turn, label):
    """Yields the (question, rows, documents) of `count` questions that keep lengths in balance.

    Args: choices: iterable of lists of alternatives, an alternative is a list of questions taken together. in_turn: each is
    spoken by one voice, the next by the other, instead of by both.
    """
    lengths, phonemes, made, seen = 0, 0, 0, set()
    with config.progress(total=count, desc=label) as bar:
        for alternatives in choices:
            voices = HELD_OUT_VOICES
            if in_turn:
                voices = [HELD_OUT_VOICES[made // 2 % len(HELD_OUT_VOICES)]]
            possible = []
            for questions in alternatives:
                texts = {text for question in questions for text in (question.right, question.wrong)}
                recorded = [studio.record(question, voices) for question in questions] if not texts & seen else [None]
                if None not in recorded:
                    tilts = abs(lengths + tilt_of(recorded)), abs(phonemes + sum(question.tilt for question in questions))
                    possible.append((tilts, len(possible), questions, recorded))
            best = min(possible, default=None, key=lambda one: one[:2])
            if best is None or best[0][0] > max(2, abs(lengths)):
                continue
            _, _, questions, recorded = best
            lengths, phonemes = lengths + tilt_of(recorded), phonemes + sum(question.tilt for question in questions)
            seen |= {text for question in questions for text in (question.right, question.wrong)}
            for question, (rows, documents) in list(zip(questions, recorded))[:count - made]:
                yield question, rows, documents
                made += 1
                bar.update()
            if made == count:
                return
    raise ValueError(f"only {made} questions of {label}, not {count}; ask for fewer with --count")


# ---------------------------------------------------------------------------------------------- files

def table(columns, rows):
    """Rows, dictionaries -> comma-separated text. Columns that are empty everywhere are left out."""
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder, recipe, made):
    """One benchmark. pairs.csv goes last: without it eval.py passes the folder by."""
    (folder / "pairs.csv").unlink(missing_ok=True)
    documents = [(name, *document) for _, _, documents in made for name, document in documents.items()]
    write_shards(folder / "units", recipe, documents, overwrite=True)  # of a run that was interrupted
    texts = [{"item": question.item, "positive": question.right, "negative": question.wrong} for question, _, _ in made]
    files.write_text(folder / "texts.csv", table(("item", "positive", "negative"), texts))
    columns = ("positive", "negative", "voice", "item", "type", "frequency", "positive_start", "negative_start")
    files.write_text(folder / "pairs.csv", table(columns, [row for _, rows, _ in made for row in rows]))


def speak_again(source, out, engine):
    """A benchmark as recordings: out/NAME.flac for every document of source/pairs.csv, whose table goes last."""
    rows, texts = (read_rows(source / name, ("item", "positive", "negative")) for name in ("pairs.csv", "texts.csv"))
    texts = {text["item"]: text for text in texts}
    voices = {voice.partition("+")[2]: (voice, *manner) for voice, *manner in HELD_OUT_VOICES}
    out.mkdir(parents=True, exist_ok=True)
    for row in config.progress(rows, desc=source.name):
        for side, text in ((side, texts[row["item"]][side]) for side in ("positive", "negative")):
            said = spelt(text.split()) if "swuggy" in source.name else text  # of words the table has phonemes
            samples, _ = engine.say_afresh(said, *voices[row["voice"]])
            row[side] += ".flac"
            soundfile.write(out / row[side], samples.numpy(), SAMPLE_RATE, subtype="PCM_16")
    files.write_text(out / "pairs.csv", table(tuple(rows[0]), rows))


def main(argv=None):
    options = config.load(PairsConfig, argv)
    if options.recordings:
        engine = Espeak()
        for source in sorted(Path(options.out).glob("*/texts.csv")):
            if not Path(options.recordings, source.parent.name, "pairs.csv").exists():
                speak_again(source.parent, Path(options.recordings, source.parent.name), engine)
        return
    studio, n = Studio(), options.count
    kinds = {"agreement": -(-n // 3), "pronoun": -(-(n - 1) // 3), "word_order": n // 3}
    benchmarks = {
        "mini-swuggy": [(word_questions(options, studio.engine), n, False)],
        "mini-sblimp": [(sentence_questions(kind, options), share, False) for kind, share in kinds.items() if share],
        "mini-sstorycloze": [(story_questions("ending", options), n, True)],
        "mini-tstorycloze": [(story_questions("topic", options), n, True)]}
    for name, parts in benchmarks.items():
        if (Path(options.out) / name / "pairs.csv").exists():
            print(f"{name}: {options.out}/{name}/pairs.csv exists, skipped")
            continue
        with packed(studio.encoder):
            made = [one for part in parts for one in balanced(*part[:2], studio, part[2], name)]
        write(Path(options.out) / name, studio.recipe, made)
        print(f"{name}: {sum(len(rows) for _, rows, _ in made)} pairs of {len(made)} questions in {options.out}/{name}")


if __name__ == "__main__":
    config.command(main)
