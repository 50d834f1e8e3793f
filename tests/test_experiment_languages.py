"""The second language: its grammar, against a paradigm that is written out here; its material, made once and not made again."""
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from corpus.shards import UnitShards, write_shards
from experiments import languages
from pocket import german
from pocket.measure import share_in_common
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


def test_text_is_made_once_and_holds_equally_many_bytes_of_both(tmp_path):
    sizes = {}
    for language in languages.LANGUAGES:
        folder = languages.text(tmp_path, language, "train", 20)
        sizes[language] = Counter({name.split()[0]: 0 for name in UnitShards(folder).names})
        for name, units, _ in UnitShards(folder):
            which, seed = name.split()
            assert bytes(units.astype(np.uint8)).decode() == languages.STORIES[which](int(seed))
            sizes[language][which] += len(units)
        before = (folder / "meta.json").stat().st_mtime_ns
        assert languages.text(tmp_path, language, "train", 20) == folder and (folder / "meta.json").stat().st_mtime_ns == before
    assert all(0 <= size - 10_000 / len(each) < 1000 for each in sizes.values() for size in each.values())
    assert {*sizes["both"]} == {"en", "de"}


class Silent:
    """An engine, and an encoder, without sound: a text has as many samples as letters."""

    num_units, recipe = 7, {"kind": "hubert", "model": "none", "layer": 1, "num_units": 7, "frame_rate": 25.0}

    def __init__(self, stop=10**9):
        self.said, self.stop = [], stop

    def say_afresh(self, words, *voice):
        if len(self.said) == self.stop:
            raise OSError("cut off")
        self.said.append((words, voice))
        return torch.full((len(words),), float(len(words))), []

    def encode_batch(self, wavs):
        return [torch.arange(len(wav)) % 7 for wav in wavs]


def test_speech_goes_on_where_it_was_cut_off_and_voices_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(languages, "BLOCK", 4)
    made = {}
    for folder, stops in (("whole", (10**9,)), ("cut", (6, 10**9))):
        for stop in stops:
            engine = Silent(stop)
            monkeypatch.setattr(languages, "engine", lambda engine=engine: engine)
            monkeypatch.setattr(languages, "load_unit_encoder", lambda name, engine=engine: engine)
            try:
                out = languages.speech_units(tmp_path / folder, "de", "train", 10)
            except OSError:
                assert stop == 6
        made[folder] = [(name, units.tolist()) for name, units, _ in UnitShards(out)]
    assert made["whole"] == made["cut"] and len(engine.said) == 6  # the four of the first shard are not said again
    again = Silent(0)
    monkeypatch.setattr(languages, "engine", lambda: again)
    assert languages.speech_units(tmp_path / "cut", "de", "train", 10) == out and not again.said
    assert [voice[0] for _, voice in engine.said] == [languages.voices_of("de", "train")[i % 10][0] for i in range(4, 10)]


def test_nothing_is_said_that_was_read_and_held_out_voices_are_not_heard_in_training():
    firsts = sorted(first for parts in languages.FIRST.values() for first in parts.values())
    assert min(b - a for a, b in zip(firsts, firsts[1:])) > 1_000_000
    for language in ("en", "de"):
        train, held_out = ({voice[0] for voice in languages.voices_of(language, part)} for part in ("train", "val"))
        assert train and held_out and not train & held_out and all(name.startswith(language) for name in train | held_out)


def test_units_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    write_shards(tmp_path / "units/de/val", {**Silent.recipe, "num_units": 9}, [("de 1", np.ones(3), np.ones(3), 1.0)])
    monkeypatch.setattr(languages, "engine", Silent)
    monkeypatch.setattr(languages, "load_unit_encoder", lambda name: Silent())
    with pytest.raises(ValueError, match="num_units is 9"):
        languages.speech_units(tmp_path, "de", "val", 2)


def apart(language, count):
    """What the tokenizer tells of a language, from two sentences of each of `count` stories, said by the two held-out voices.

    Returns: {"same", "different": shares of units in common between the voices, of the same and of other sentences; "found":
    share of sentences whose most alike by the other voice is the same; "used": units that occur; "bits": their entropy}.
    """
    encoder, voices, said = languages.load_unit_encoder("pocket"), languages.voices_of(language, "val"), []
    for seed in range(languages.TEXT_VAL, languages.TEXT_VAL + count):
        words = ". ".join(languages.STORIES[language](seed).split(". ")[2:4])
        said.append([deduplicate(encoder.encode(languages.engine().say_afresh(words, *voice)[0]))[0].numpy() for voice in voices])
    alike = np.array([[share_in_common(a, b) for _, b in said] for a, _ in said])
    shares = np.bincount(np.concatenate([units for both in said for units in both]), minlength=encoder.num_units)
    shares = shares[shares > 0] / shares.sum()
    return {"same": float(alike.diagonal().mean()), "different": float(alike[~np.eye(count, dtype=bool)].mean()),
            "found": float((alike.argmax(1) == np.arange(count)).mean()), "used": len(shares),
            "bits": float(-(shares * np.log2(shares)).sum())}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_three_stories_are_spoken_and_told_apart(tmp_path):
    shards = UnitShards(languages.speech_units(tmp_path, "de", "val", 3))
    assert len(shards) == 3 and all(100 < len(units) < 2000 and units.max() < 200 for _, units, _ in shards)
    found = apart("de", 3)
    assert found["found"] == 1 and found["same"] > found["different"] + 0.2 and 50 < found["used"] <= 200 and found["bits"] > 5
