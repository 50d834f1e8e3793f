"""German children's stories from a small grammar: text in a second language, for what a text LM knows of one and not the other.

    seed --> cast and state --events, remarks--> templates --cases, genders, order--> a story of 9 to 15 sentences

German, because its grammar is not that of English: articles, adjectives and pronouns agree in three genders, two numbers and
three cases; the finite verb is second in a main clause, whatever comes first, and last in a subordinate one. A story is a walk
over a state, which says who holds what and where all are; whatever is remarked, known or answered in it is true.

    python -c "from pocket.german import story; print(story(0))"
"""
import re
from collections import namedtuple
from random import Random


def read(table):
    """A table "* kind: template / template * kind: ..." as {kind: [template, ...]}."""
    blocks = (block.split(": ", 1) for block in " ".join(table.split()).split("* ")[1:])
    return {kind: [line.strip() for line in lines.split(" / ")] for kind, lines in blocks}


GENDERS = "mfnp"  # masculine, feminine, neuter; p: many of any gender. The columns of these tables; their rows are the cases
DER = {"n": "der die das die".split(), "a": "den die das die".split(), "d": "dem der dem den".split()}  # also who, whom
EIN = {"n": ("", "e", "", "e"), "a": ("en", "e", "", "e"), "d": ("em", "er", "em", "en")}  # endings of ein, sein, ihr
WEAK = {"n": "e e e en".split(), "a": "en e e en".split(), "d": "en en en en".split()}  # of adjectives after der
MIXED = {"n": "er e es e".split(), "a": "en e es e".split(), "d": "en en en en".split()}  # after ein; of many: after zwei
PRONOUNS = {"n": "er sie es sie".split(), "a": "ihn sie es sie".split(), "d": "ihm ihr ihm ihnen".split()}
NAMES = {"f": "Anna Clara Emma Lena Maria Nina Paula Rosa".split(), "m": "Anton David Jonas Max Otto Paul Peter Tim".split()}
KIN = {"f": "Schwester Mutter Tante Freundin".split(), "m": "Bruder Vater Onkel Freund".split()}
THINGS = """Ball:m:Bälle Apfel:m:Äpfel Schlüssel:m:Schlüssel Hut:m:Hüte Ring:m:Ringe Stein:m:Steine Brief:m:Briefe
    Löffel:m:Löffel Puppe:f:Puppen Tasse:f:Tassen Blume:f:Blumen Karte:f:Karten Lampe:f:Lampen Uhr:f:Uhren Münze:f:Münzen
    Flasche:f:Flaschen Buch:n:Bücher Boot:n:Boote Bild:n:Bilder Tuch:n:Tücher Glas:n:Gläser Kleid:n:Kleider Brot:n:Brote
    Ei:n:Eier""".split()
BOXES = "Korb:m Koffer:m Sack:m Eimer:m Kiste:f Truhe:f Tasche:f Tonne:f Fass:n Kästchen:n Zelt:n".split()
PLACES = "Garten:m Wald:m Park:m Stall:m Keller:m Küche:f Schule:f Scheune:f Stadt:f Haus:n Dorf:n Zimmer:n".split()
ANIMALS = "Hund:m Vogel:m Frosch:m Esel:m Katze:f Kuh:f Maus:f Ente:f Pferd:n Schaf:n Huhn:n Schwein:n".split()
COLOURS = "rot blau grün gelb weiß schwarz braun bunt".split()
QUALITIES = "klein groß alt neu schön leicht schwer fein".split()
NATURES = "jung klein groß dick dünn brav schlau lustig wild".split()
# Kinds of events and remarks with their templates. A clause is subject|finite verb, in the singular|middle|last part|participle;
# the last only where it may also be told in the perfect. " ~ " goes before a conjunction and its clause, " + " before another
# sentence. S does it, O is the other person, X a thing, K a box, L a place, P an animal. After a dot p: as a pronoun, r: as a
# relative pronoun, k: with the relation (ihrem Bruder Max); then the case: a, d, or none for the nominative.
KINDS = read("""
* go: S|ging|in L.a / S|lief|schnell in L.a / S|kam|in L.a / S|ging|in L.a ~ weil S|wollte|dort|spielen
* carry: S|ging|mit X.d in L.a / S|lief|mit X.d in L.a / S|brachte|X.a in L.a
* together: S|ging|mit O.d in L.a / S|lief|mit O.d schnell in L.a
* take: S|nahm|X.a||genommen / S|fand|X.a||gefunden / S|hob|X.a|auf-|aufgehoben / S|nahm|X.a|mit-|mitgenommen /
    S|nahm|X.a ~ weil S|brauchte|X.pa / S|hob|X.a|auf- ~ weil X.p|gefiel|S.d sehr
* out: S|nahm|X.a aus K.d||genommen / S|holte|X.a aus K.d||geholt / S|holte|X.a aus K.d ~ weil S|wollte|X.pa|haben
* in: S|legte|X.a in K.a||gelegt / S|packte|X.a in K.a||gepackt / S|versteckte|X.a in K.d||versteckt /
    S|legte|X.a in K.a ~ weil S|brauchte|X.pa nicht mehr / S|versteckte|X.a in K.d ~ weil niemand|sollte|X.pa|finden
* drop: S|verlor|X.a in L.d||verloren / S|ließ|X.a in L.d|liegen ~ weil S|brauchte|X.pa nicht mehr / S|ließ|X.a in L.d|liegen
* give: S|gab|O.d X.a||gegeben / S|schenkte|O.d X.a||geschenkt / S|gab|O.d X.a ~ weil O|brauchte|X.pa
* animal: P|lief|in L.a / P|rannte|schnell in L.a
* held: S|hatte|nun X.a / X|gehörte|nun S.d / S|freute|sich ~ weil S|hatte|X.a / O|war|traurig ~ weil S|hatte|X.a /
    O|wusste|| ~ dass S|hatte|X.a
* inside: X|lag|in K.d / S|wusste|| ~ dass X|lag|in K.d / X|blieb|in K.d
* lying: X|lag|in L.d / S|wusste|| ~ dass X|lag|in L.d / O|dachte|| ~ dass X|lag|in L.d
* missing: S|suchte|X.a in L.d ~ aber X.p|war|nicht dort
* ask_held: O|fragte|S.a ~ wo X|war + S|antwortete|| ~ dass S|hatte|X.pa
* ask_inside: S|fragte|O.a ~ wo X|war + O|antwortete|| ~ dass X.p|lag|in K.d
* found: X, X.ra S gefunden hatte,|gefiel|O.d sehr
* look: X.p|war|{look}
* asleep: P|schlief|in L.d
* child: S|war|ein {look}es Kind / S|war|wirklich ein {look}es Kind
* opening: S|war|mit O.kd in L.d / S|spielte|mit O.kd in L.d
* closing: S|schlief|zufrieden|ein- / S|ging|müde nach Hause / S|dachte|noch lange an den schönen Tag
""")
FIELD = re.compile(r"\b([SOXKLP])\b(?:\.([prk]?)([ad]?)\b)?")
FRONTS = ("", "", "dann", "danach", "bald", "später", "kurz darauf")
# word: of one or of many. look, also: stems of adjectives. count: of many, zwei or drei. kin: of a person, what it is to A
Noun = namedtuple("Noun", "word gender look also count kin", defaults=("", "", "", None))


class Tale:
    """A cast, a state and a stream of random numbers, all of a seed."""

    def __init__(self, seed):
        rng = Random(f"German {seed}")
        self.rng, self.pick = rng, rng.choice
        self.known, self.said, self.before = {*"123"}, set(), set()  # mentioned in the story, this sentence, the last one
        self.topic, self.finder, self.told = "", {}, []  # subject of the last sentence; thing -> who found it; kinds so far
        (a, b), names = rng.choices("fm", k=2), {sex: rng.sample(row, 2) for sex, row in NAMES.items()}
        self.cast = {"A": Noun(names[a][0], a, also=self.pick(NATURES), kin=""),
                     "B": Noun(names[b][1], b, kin=self.pick(KIN[b]))}
        for key, noun in zip("XYZ", rng.sample(THINGS, 3)):
            (word, gender, many), count = noun.split(":"), self.pick(("", "", "", "zwei", "drei"))
            word, gender = (many, "p") if count else (word, gender)
            self.cast[key] = Noun(word, gender, self.pick(COLOURS), self.pick(QUALITIES), count)
        for keys, nouns, looks in (("KM", BOXES, COLOURS), ("123", PLACES, QUALITIES[:5]), ("P", ANIMALS, NATURES)):
            for key, noun in zip(keys, rng.sample(nouns, len(keys))):
                self.cast[key] = Noun(*noun.split(":"), self.pick(looks))
        # each at a place (1, 2, 3), in a box (K, M), or in somebody's hands (A, B)
        self.at = {"A": "1", "B": "1", "P": "1", "K": "1", "M": self.pick("23"), "X": "1", "Y": "K", "Z": self.pick("23M")}

    def fill(self, match):
        """A noun phrase or pronoun in place of a field; self.roles says for whom or what its letter stands."""
        form, case, key = match[2], match[3] or "n", self.roles[match[1]]
        noun, column = self.cast[key], GENDERS.index(self.cast[key].gender)
        if form == "r":
            return DER[case][column]
        again = key in self.said or key == self.topic and self.pick((False, True, True))
        first, owner_is_said = key not in self.known, "A" in self.said
        self.known.add(key)
        self.said.add(key)
        if form == "p" or noun.kin is not None and again and form != "k":
            return PRONOUNS[case][column]
        if noun.kin is not None:
            relation = ("sein" if self.cast["A"].gender == "m" else "ihr") + EIN[case][column] + " " + noun.kin
            by_relation = key == "B" and owner_is_said and self.pick((False, True))
            return f"{relation} {noun.word}" if form == "k" else relation if by_relation else noun.word
        article = DER[case][column] if not first else noun.count or "ein" + EIN[case][column]
        look = " " + noun.look + (MIXED if first else WEAK)[case][column] if first or self.pick((False, True)) else ""
        return f"{article}{look} {noun.word}" + "n" * (case == "d" and column == 3 and noun.word[-1] not in "ns")

    def clause(self, text, order="main", front=""):
        """A clause in words. order: main, the finite verb second; last, at the end; perfect, likewise, with an auxiliary."""
        subject, verb, middle, last, participle = (text + "||||").split("|")[:5]
        if (key := self.roles.get(subject[0])) and self.cast[key].gender == "p":
            verb += "n" if verb.endswith("e") else "en"
        if verb == "fand":
            self.finder[self.roles["X"]] = self.roles["S"]
        parts = {"main": [front, verb, subject, middle, last] if front else [subject, verb, middle, last],
                 "last": [subject, middle, last + verb if last.endswith("-") else f"{last} {verb}"],
                 "perfect": [subject, middle, participle, "hatte"]}
        return " ".join(FIELD.sub(self.fill, part.replace("-", "").strip()) for part in parts[order] if part)

    def perfect(self, kind, roles):
        """An event as the clause that opens a sentence about the next."""
        self.roles, texts = roles, [text for text in KINDS[kind] if text.count("|") == 4 and "~" not in text]
        return f"nachdem {self.clause(self.pick(texts), 'perfect')},"

    def say(self, kind, roles, fronts=("",), before=""):
        """A sentence, or two, of one of a kind's templates; before: a clause that is said already and opens it."""
        told = []
        for text in self.pick(KINDS[kind]).split(" + "):
            self.roles, (main, *more) = roles, text.split(" ~ ")
            front, parts = before or self.pick(fronts), main.format(look=self.cast[roles.get("X", "A")].also).split("|")
            if not front and (moved := re.search(r"X\.a|in [KL]\.d", parts[2])) and self.rng.random() < 0.33:
                front, parts[2] = moved[0], parts[2].replace(moved[0], "").strip()
            words = self.clause("|".join(parts), front=front)
            for conjunction, clause in (one.split(" ", 1) for one in more):
                words += f", {conjunction} " + self.clause(clause, "main" if conjunction == "aber" else "last")
            self.before, self.said, self.topic = self.said, set(), roles.get(main[0], "")
            words = re.sub(r"\bin dem\b", "im", re.sub(r"\bin das\b", "ins", words))
            told.append(words[0].upper() + words[1:] + ".")
        return told

    def possible(self):
        """What can happen, [(kind, roles, who or what moves, where to)], and what is true to say, [(kind, roles)]."""
        at, events, remarks = self.at, [], []
        for s, o in ("AB", "BA"):
            here, beside = at[s], at[s] == at[o]
            ways = [{"S": s, "O": o, "L": place} for place in "123" if place != here]
            for way in ways:
                events += [("go", way, s, way["L"])] + [("together", way, s + o, way["L"])] * beside
            for x in "XYZ":
                roles, spot, known = {"S": s, "O": o, "L": here, "X": x}, at[x], x in self.known
                if spot == s:
                    events += [("drop", roles, x, here)] + [("give", roles, x, o)] * beside
                    events += [("carry", way | {"X": x}, s, way["L"]) for way in ways]
                    events += [("in", roles | {"K": box}, x, box) for box in "KM" if at[box] == here]
                    remarks += [("held", roles)] + [("ask_held", roles)] * beside
                elif spot == here:
                    events.append(("take", roles, x, s))
                elif at.get(spot) == here and spot in "KM":
                    events.append(("out", roles | {"K": spot}, x, s))
                if known and spot in "KM":
                    remarks += [("inside", roles | {"K": spot})] + [("ask_inside", roles | {"K": spot})] * beside
                remarks += [("lying", roles | {"L": spot})] * (known and spot in "123")
                remarks += [("missing", roles)] * (known and at.get(spot, spot) != here)
                remarks += [("found", roles)] * (self.finder.get(x) == s) + [("look", roles)] * (x in self.before)
        events += [("animal", {"P": "P", "L": place}, "P", place) for place in "123" if place != at["P"]]
        return events, remarks + [("asleep", {"P": "P", "L": at["P"]})]

    def one(self, rows):
        """A row, of possible(), of a kind that is drawn first from those that this story has told least often."""
        times = {kind: self.told.count(kind) for kind in sorted({row[0] for row in rows})}
        self.told.append(self.pick([kind for kind in times if times[kind] == min(times.values())]))
        return self.pick([row for row in rows if row[0] == self.told[-1]])


def story(seed):
    """One story, the same for the same seed."""
    tale = Tale(seed)
    rng, at, both = tale.rng, tale.at, {"S": "A", "O": "B", "L": "1"}
    lines = tale.say("child", both) + tale.say("opening", both, ("an einem sonnigen Morgen", "an einem kalten Tag"))
    length = rng.randrange(7, 13)
    while len(lines) < length:
        events, remarks = tale.possible()
        remarks = [row for row in remarks if row[0] not in tale.told[-5:]]
        if remarks and rng.random() < 0.4:
            lines += tale.say(*tale.one(remarks))
            continue
        kind, roles, moved, to = tale.one(events)
        after = [row for row in events if row[0] == "go" and row[2] == roles.get("S")]
        if kind in ("take", "out", "in", "give", "drop") and after and rng.random() < 0.3:  # two events in one sentence
            before = tale.perfect(kind, roles)
            at[moved] = to
            kind, roles, moved, to = tale.one(after)
            lines += tale.say(kind, roles, before=before)
        else:
            lines += tale.say(kind, roles, FRONTS)
        at |= dict.fromkeys(moved, to)
    remarks = [row for row in tale.possible()[1] if row[0] in ("held", "inside", "lying", "asleep")]
    return " ".join(lines + tale.say(*tale.one(remarks), ("am Abend",)) + tale.say("closing", both, ("dann", "schließlich")))
