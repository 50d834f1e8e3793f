"""The second language: its grammar, against a paradigm that is written out here. Variants of the pocket's speech."""
import csv
import re
import shutil
from collections import Counter

import numpy as np
import pytest

import eval as evaluate
import twist
from checkpoints import files
from conftest import TINY
from corpus.shards import UnitShards
from hubert_units import load_unit_encoder
from pocket import german, pairs, stories, variants
from pocket import text as pocket_text
from pocket.build import SPOKEN, SPOKEN_VAL, TEXT, TEXT_VAL
from pocket.measure import share_in_common
from pocket.speech import Espeak, voices_of
from speech.audio import SAMPLE_RATE, read_wav
from speech.encoder import deduplicate

STORIES = [german.story(seed) for seed in range(400)]
SENTENCES = [sentence.rstrip(".") for story in STORIES for sentence in re.split(r"(?<=\.) ", story)]
# What may stand before a noun, for each gender and for many, and before the dative of many; im and ins as after dem and das.
PARADIGM = {
    "m": "der rote, den roten, dem roten, ein roter, einen roten, einem roten, im roten",
    "f": "die rote, der roten, eine rote, einer roten",
    "n": "das rote, dem roten, ein rotes, einem roten, im roten, ins rote",
    "many": "die roten, zwei rote, drei rote", "many, dative": "den roten, zwei roten, drei roten"}
PARADIGM = {gender: {tuple(form.split()) for form in forms.split(", ")} for gender, forms in PARADIGM.items()}
GENDER = {noun: gender for gender, row in {
    "m": "Ball Brief Hund Frosch Korb Sack Garten Wald", "f": "Tasse Uhr Katze Ente Kiste Truhe Küche Stadt",
    "n": "Buch Kleid Schwein Pferd Fass Zelt Haus Dorf", "many": "Hüte Tassen Bücher", "many, dative": "Hüten Büchern Äpfeln",
}.items() for noun in row.split()}
FINITE = """war waren ging lief kam brachte nahm fand hob holte legte packte versteckte verlor ließ gab schenkte rannte hatte
    gehörte gehörten freute wusste lag lagen blieb blieben dachte suchte fragte antwortete gefiel gefielen schlief spielte
    brauchte wollte sollte""".split()
GLUED = {"aufhob", "mitnahm"}  # at the end of a clause a verb and its first part are one word
OPENERS = {"weil", "dass", "wo", "nachdem"}


def test_a_story_is_a_function_of_its_seed():
    assert german.story(7) == STORIES[7] and len(set(STORIES)) == len(STORIES)
    assert {story.count(".") for story in STORIES} == {*range(9, 16)}


def test_articles_adjectives_and_nouns_agree():
    """What stands before some nouns of each gender is of its paradigm, and nearly all of the paradigms occurs."""
    stems = sorted(german.COLOURS + german.QUALITIES + german.NATURES, key=len, reverse=True)
    seen = {gender: set() for gender in PARADIGM}
    for article, adjective, noun in re.findall(r"(\w+) (\w+) (" + "|".join(GENDER) + r")\b", " ".join(STORIES)):
        gender, stem = GENDER[noun], next((stem for stem in stems if adjective.startswith(stem)), None)
        if noun == "Tassen" and article == "den" or adjective == "den":  # also the dative of many
            gender = "many, dative"
        if stem is None:  # no adjective: the word before the noun is the article
            assert adjective.lower() in {form[0] for form in PARADIGM[gender]}, (adjective, noun)
        else:
            seen[gender].add((article.lower(), "rot" + adjective.removeprefix(stem)))
            assert seen[gender] <= PARADIGM[gender], (article, adjective, noun)
    assert seen["m"] == PARADIGM["m"] and seen["f"] == PARADIGM["f"] and seen["n"] == PARADIGM["n"]
    assert seen["many"] == PARADIGM["many"] and ("den", "roten") in seen["many, dative"]


def test_the_verb_agrees_with_the_number_of_its_subject():
    many = {noun.split(":")[2] for noun in german.THINGS} - {noun.split(":")[0] for noun in german.THINGS}
    subject, verb = r"(?:[.] |wo |dass )(?i:die|der|das) (?:\w+ )?([A-ZÄÖÜ]\w+)", "(?:war|lag|blieb|gehörte)(n|en|)"
    found = Counter()
    for noun, ending in re.findall(rf"{subject} {verb}\b", " ".join(STORIES)):
        assert (noun in many) == (ending != "") or noun in ("Schlüssel", "Löffel"), noun
        found[noun in many] += 1
    assert found[True] > 20 and found[False] > 20


def main_clause(text, names):
    """Whether exactly one constituent stands before the only finite verb of a main clause."""
    before, verb, after = re.fullmatch(r"(.*?)\b(" + "|".join(FINITE) + r")\b(.*)", text).groups()
    phrase = r"(?:zwei|drei|\w*(?:ein|der|die|das|den|dem|sein|ihr)\w{0,2}|im)(?: \w+)? \w+|er|sie|es|" + "|".join(names)
    adverb = "dann|danach|bald|später|kurz darauf|schließlich|am abend|an einem sonnigen morgen|an einem kalten tag"
    return bool(re.fullmatch(f"(?i:in (?:{phrase})|{phrase}|{adverb}) ", before)) and not set(after.split()) & {*FINITE}


def test_the_finite_verb_is_second_in_main_clauses_and_last_in_others():
    names = [name for row in german.NAMES.values() for name in row]
    kinds = Counter()
    for sentence in SENTENCES:
        clauses = sentence.split(", ")
        if re.match(r"d(er|ie|as|en) .* gefunden hatte$", clauses[-1 if len(clauses) == 1 else 1]):  # a relative clause
            clauses = [f"{clauses[0]} {clauses[2]}"]
            kinds["relative"] += 1
        for i, clause in enumerate(clauses):
            words = clause.split()
            if words[0].lower() in OPENERS:
                finite = [word in FINITE or word in GLUED for word in words]
                assert finite[-1] and sum(finite) == 1, sentence
                kinds[words[0].lower()] += 1
            elif i and clauses[0].startswith("Nachdem"):
                assert words[0] in FINITE and not {*words[1:]} & {*FINITE}, sentence
            else:
                assert main_clause(clause.removeprefix("aber "), names), sentence
                kinds["main"] += 1
    assert min(kinds[kind] for kind in (*OPENERS, "relative", "main")) > 5


def test_the_vocabulary_is_closed_and_no_template_shows_through():
    words = {word for story in STORIES for word in re.findall(r"\w+", story)}
    assert len(words) < 360 and {line.split(":")[0] for line in german.PLACES + german.ANIMALS + german.BOXES} <= words
    assert all({line.split(":")[0], line.split(":")[2]} & words for line in german.THINGS)
    assert not [story for story in STORIES if re.search(r"[|~{}+*:-]|\b[A-Z]\b|  | ,|\bin (dem|das)\b", story)]


def test_what_happens_can_and_what_is_remarked_is_so(monkeypatch):
    """The events that stories tell are played again, by rules that are written out here."""
    at, told = {}, Counter()

    def place(key):
        return key if key in "123" else place(at[key])

    def check(tale, kind, roles):
        s, o, x, k, l = (roles.get(role) for role in "SOXKL")
        beside = s is None or at[s] == at[o]
        true = {"go": lambda: l != at[s], "carry": lambda: at[x] == s and l != at[s], "together": lambda: beside and l != at[s],
                "take": lambda: at[x] == at[s], "out": lambda: at[x] == k and at[k] == at[s],
                "give": lambda: at[x] == s and beside, "in": lambda: at[x] == s and at[k] == at[s],
                "drop": lambda: at[x] == s and l == at[s],
                "animal": lambda: l != at["P"], "asleep": lambda: l == at["P"], "held": lambda: at[x] == s,
                "ask_held": lambda: at[x] == s and beside, "inside": lambda: at[x] == k,
                "ask_inside": lambda: at[x] == k and beside, "lying": lambda: at[x] == l,
                "missing": lambda: l == at[s] and place(x) != l}
        assert true.get(kind, lambda: True)(), (kind, roles, at)
        told[kind] += 1
        at.update({"go": {s: l}, "carry": {s: l}, "together": {s: l, o: l}, "take": {x: s}, "out": {x: s}, "give": {x: o},
                   "in": {x: k}, "drop": {x: l}, "animal": {"P": l}}.get(kind, {}))

    def begin(tale, seed):
        init(tale, seed)
        at.clear()
        at.update(tale.at)

    def say(tale, kind, roles, *more, **options):
        check(tale, kind, roles)
        words = " ".join(said(tale, kind, roles, *more, **options))
        heard = {"inside": "K", "asleep": "P", "missing": "XL"}.get(kind, "")
        assert all(tale.cast[roles[role]].word in words for role in heard), words
        return [words]

    def perfect(tale, kind, roles):
        check(tale, kind, roles)
        return in_perfect(tale, kind, roles)

    init, said, in_perfect = german.Tale.__init__, german.Tale.say, german.Tale.perfect
    for name, spy in (("__init__", begin), ("say", say), ("perfect", perfect)):
        monkeypatch.setattr(german.Tale, name, spy)
    for seed in range(300):
        german.story(seed)
    assert {*told} == {*german.KINDS} and min(told.values()) > 10


def test_german_text_is_utf8_and_stands_beside_english(tmp_path):
    for language in ("en", "de", "de"):  # what is there stays, and nothing is written twice
        pocket_text.main([f"--out={tmp_path}", "--count=5", "--first-story=3", f"--language={language}"])
    told = {name: bytes(units.astype(np.uint8)).decode() for name, units, _ in UnitShards(tmp_path)}
    assert told == {**{f"story {seed}": stories.story(seed) for seed in range(3, 8)},
                    **{f"de story {seed}": german.story(seed) for seed in range(3, 8)}}


def test_nothing_is_said_that_was_read_and_held_out_voices_are_not_heard_in_training():
    firsts = sorted((TEXT, TEXT_VAL, SPOKEN, SPOKEN_VAL))
    assert min(b - a for a, b in zip(firsts, firsts[1:])) > 1_000_000
    assert {first for _, first in variants.SPEAKING.values()} == {SPOKEN, SPOKEN_VAL}
    for language in ("en", "de"):
        train, held_out = ({voice[0] for voice in voices_of(language, variants.SPEAKING[part][0])} for part in ("train", "val"))
        assert train and held_out and not train & held_out and all(name.startswith(language) for name in train | held_out)


needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def engine():
    """The one engine that the library allows a process."""
    return Espeak()


def few(source, out, rows):
    """The first rows of a bundled benchmark."""
    for table in ("pairs.csv", "texts.csv"):
        files.write_text(out / table, "\n".join((source / table).read_text().splitlines()[:1 + rows]) + "\n")
    return out


@pytest.mark.slow
@needs_espeak
def test_another_tokenizer_and_its_benchmarks_are_made_once_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "COUNTS", {"en": {"train": 4, "val": 2}})
    few(files.POCKET / "benchmarks/mini-swuggy", tmp_path / "few/mini-swuggy", 4)
    run = variants.run
    monkeypatch.setattr(variants, "run", lambda *words: run(*words, *[f"--out={tmp_path}/few"] * ("pocket.pairs" in words)))
    made = variants.other_tokenizer(tmp_path, 12.5, 20)
    train = UnitShards(made / "train")
    assert train.recipe["frame_rate"] == 12.5 and train.recipe["num_units"] == 20 and len(train) == 4
    assert UnitShards(made / "val").recipe == train.recipe and files.read_json(made / variants.ENCODING)["seconds_an_hour"] > 0
    for (_, _, runs), file in zip(train, train.each_file(), strict=True):
        assert sum(runs) == pytest.approx(12.5 * file["seconds"], abs=2)
    monkeypatch.setattr(variants, "run", lambda *words: None if "pocket.pairs" in words else pytest.fail("it is there"))
    assert variants.other_tokenizer(tmp_path, 12.5, 20) == made
    vocab = twist.UnitVocab(20, recipe=train.recipe)
    twist.save_speech_lm(twist.cold_start(TINY, vocab), vocab, tmp_path / "lm")
    evaluate.main([f"--model={tmp_path}/lm", "--task=swuggy", f"--data={made}/benchmarks", f"--train-data={made}/train",
                   f"--out={tmp_path}/eval", "--resamples=100", "--dtype=float32"])
    rows = files.read_json(tmp_path / "eval/result.json")["sections"][0]["rows"]
    assert {row["n"] for row in rows if row["subset"] == "all"} == {2}  # questions, each by two voices


@pytest.mark.slow
@needs_espeak
@pytest.mark.parametrize("name", ["mini-swuggy", "mini-sblimp", "mini-tstorycloze"])
def test_benchmarks_are_spoken_again_as_they_were(name, tmp_path, engine):
    """Each is about as long as in the bundle, its units nearly those: espeak's samples differ in last bits by machine."""
    source, encoder = files.POCKET / "benchmarks" / name, load_unit_encoder()
    pairs.speak_again(few(source, tmp_path / name, 4), tmp_path / "spoken", engine)
    shards = UnitShards(source / "units")
    stored = {name: (units, file["seconds"]) for (name, units, _), file in zip(shards, shards.each_file(), strict=True)}
    with open(tmp_path / "spoken/pairs.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 4
    alike = []
    for spoken in (row[side] for row in rows for side in ("positive", "negative")):
        wav, (units, seconds) = read_wav(tmp_path / "spoken" / spoken), stored[spoken.removesuffix(".flac")]
        alike.append(share_in_common(deduplicate(encoder.encode(wav))[0].numpy(), units))
        assert len(wav) / SAMPLE_RATE == pytest.approx(seconds, abs=0.06)  # pauses behind words vary with what was asked before
    assert sum(alike) / len(alike) > 0.7


def apart(language, count, engine):
    """What the tokenizer tells of a language, from two sentences of each of `count` stories, said by the two held-out voices.

    Returns: {"same", "different": shares of units in common between the voices, of the same and of other sentences; "found":
    share of sentences whose most alike by the other voice is the same; "used": units that occur; "bits": their entropy}.
    """
    encoder, voices, said = load_unit_encoder(), voices_of(language, "held_out"), []
    for seed in range(TEXT_VAL, TEXT_VAL + count):
        words = ". ".join(pocket_text.STORIES[language](seed).split(". ")[2:4])
        said.append([deduplicate(encoder.encode(engine.say_afresh(words, *voice)[0]))[0].numpy() for voice in voices])
    alike = np.array([[share_in_common(a, b) for _, b in said] for a, _ in said])
    shares = np.bincount(np.concatenate([units for both in said for units in both]), minlength=encoder.num_units)
    shares = shares[shares > 0] / shares.sum()
    return {"same": float(alike.diagonal().mean()), "different": float(alike[~np.eye(count, dtype=bool)].mean()),
            "found": float((alike.argmax(1) == np.arange(count)).mean()), "used": len(shares),
            "bits": float(-(shares * np.log2(shares)).sum())}


@pytest.mark.slow
@needs_espeak
def test_german_stories_are_spoken_and_told_apart(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(variants, "COUNTS", {"de": {"train": 3, "val": 2}})
    made = variants.german(tmp_path)
    for part, count in variants.COUNTS["de"].items():
        shards = UnitShards(made / part)
        assert len(shards) == count and all(100 < len(units) < 2000 and units.max() < 200 for _, units, _ in shards)
    found = apart("de", 3, engine)
    assert found["found"] == 1 and found["same"] > found["different"] + 0.2 and 50 < found["used"] <= 200 and found["bits"] > 5
