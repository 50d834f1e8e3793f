"""What a speech LM knows, with error bars: perplexity, sWUGGY, sBLIMP, StoryCloze, SALMon, pairs of your own, generation.

    wavs as the archives unzip --units, cached--> documents --log-likelihood--> score of each --pairs--> accuracy [interval]
    the same documents --unigram, bigram, length--> what a model must beat --> the same table

    python eval.py                                                        # all that the pocket world holds, offline
    python eval.py --task=ppl --data=units/val --model=runs/mine/model
    python eval.py --task=sblimp --data=sLM21-dataset --model=TWIST-350M --tokenizer=mhubert-base-25hz --train-data=units/train
    python eval.py --task=sstorycloze --data=sSC.zip --model=runs/mine/model --versus=runs/cold/model
    python eval.py --task=generation --recognise="python hear.py"          # what a recogniser of yours hears, docs/evaluation.md
    python eval.py --task=mmos --data=ratings                             # what raters of python -m pages rate answered
    torchrun --nproc-per-node=8 eval.py --task=all --data=benchmarks/ ...  # encoding and scoring divided over the processes

What --data may hold: see the head of evaluation/sets.py; for ppl and generation it is a folder of unit shards or recordings.
Averages, intervals and tests: accuracy.py. The defaults are the field's practice (mean log-likelihood per unit, the first token
given and not scored, the last one neither given nor scored, ties count half, dev split, whole stories); each is printed with the
result. A sequence beyond the model's window is cut off in a pair (and counted in a note) and scored by a sliding window in ppl.
"""
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

import config
import hubert_units
import twist
from checkpoints import download
from checkpoints.files import POCKET, find, find_model
from checkpoints.recognise import recognise
from corpus.extract import encode_files, find_audio
from corpus.shards import UnitShards, check_recipe, names_in
from evaluation import generation, opinion, pairs, perplexity, reports, sets, speaking, transcripts
from evaluation.likelihood import UnitCounts, log_probabilities
from kernels.dtypes import DTYPES, free_memory, weights_dtype
from kernels.packed import packed
from speech.encoder import BUDGET_SECONDS
from training import distributed
from vocoder import load_vocoder

TASKS = ("all", "ppl", *sets.TASKS, "generation", "mmos")
POCKET_BENCHMARKS = POCKET / "benchmarks"
PUBLISHED = Path(__file__).parent / "evaluation/published.txt"


@dataclass(frozen=True)
class EvalConfig(hubert_units.TokenizerOptions, twist.SpeechLMOptions):
    task: str = "all"  # all | ppl | swuggy | sblimp | sstorycloze | tstorycloze | salmon | pairs | generation | mmos
    data: str | None = None  # sets, folder or zip; ppl, generation: unit shards, recordings; mmos: ratings; default the pocket's
    versus: str | None = None  # a second speech LM of the same units: differences, with a paired test
    out: str = "runs/eval"  # folder for result.json, result.csv, scores of pairs, submission/; older ones: result-1.json, ...
    published: bool = False  # print published numbers and their conventions too
    split: str = "dev"  # of sLM21: dev | test; published numbers are commonly of dev
    voices: tuple[str, ...] = ()  # only these voices, divided by commas; default all
    norm: str = "mean"  # log-likelihood of a sequence: mean per unit | sum (favours short ones)
    bos: str = "auto"  # the beginning token before the first unit, given and not scored: auto (if the model has one) | yes | no
    eos: bool = False  # score the ending token too (slamkit does)
    ties: float = 0.5  # what a pair of equal scores counts; 0: wrong
    score: str = "whole"  # whole sequences | ending: what follows the units that both of a pair begin with, or as pairs.csv says
    long: str = "truncate"  # pairs longer than the model's window: truncate | slide (a window, as ppl does)
    stride: int = 0  # step of the sliding window, units; 0: half the window
    train_data: str = "pocket"  # unit shards that unigram and bigram are fitted to
    resamples: int = 2000  # of the bootstrap
    seed: int = 0  # of the bootstrap, the paired test and generation
    cache: str | None = None  # folder that keeps units of recordings, by recipe and files; default units/ in NANOTWIST_HOME
    workers: int = 0  # threads that decode recordings ahead, 0: as hubert_units.py; recognisers at once, 0: one a core
    budget: int = 0  # tokens in one forward; 0: a default for the device
    prompts: int = 100  # generation: number of held-out documents that are continued
    prompt_seconds: float = 3.0  # generation: what the model hears of each, turned into units at the average rate
    max_new_units: int = 150  # generation: longest continuation
    temperature: float = 0.8  # generation: 0 takes the likeliest unit each time
    top_k: int | None = None  # generation: draw among the k likeliest units only
    top_p: float | None = None  # generation: draw among the likeliest units that together reach this probability
    transcripts: str | None = None  # generation: what was heard, .jsonl (name, text) or lines name<TAB>text
    recognise: str | None = None  # generation: command that prints the transcript of a wav, named last or at {}; all is spoken
    references: str | None = None  # generation: what was said in the documents, as --transcripts: word error of re-synthesis
    text_lm: str = "pocket"  # generation: text LM that scores transcripts without log-probabilities of their own
    text_tokenizer: str | None = None  # generation: its tokenizer.json, if not in its folder; the pocket's reads bytes
    vocoder: str = "pocket"  # generation: speaks for --recognise and --page: folder or weight file, `pocket`, or a known name
    speaker: str | None = None  # generation: number or name of the voice, where the vocoder has several
    style: str | None = None  # generation: number or name of the speaking style, where the vocoder has several
    page: str | None = None  # generation: also a page to listen to, index.html: beside (the wavs; --page alone) | inline
    ALONE = {"page": "beside"}
    CHOICES = {"task": TASKS, "split": ("dev", "test"), "norm": ("mean", "sum"), "bos": ("auto", "yes", "no"),
               "score": ("whole", "ending"), "long": ("truncate", "slide"),
               "page": ("beside", "inline")}
    NEEDS = {"split": "task=all|swuggy|sblimp"} | dict.fromkeys(
        ("voices", "norm", "ties", "score", "long"), "task=" + "|".join(("all", *sets.TASKS))) | dict.fromkeys(
        ("prompts", "prompt_seconds", "max_new_units", "temperature", "transcripts", "recognise", "page"),
        "task=all|generation") | dict.fromkeys(("top_k", "top_p"), "task=all|generation temperature") | dict.fromkeys(
        ("references", "text_lm", "text_tokenizer"), "task=all|generation recognise|transcripts") | dict.fromkeys(
        ("vocoder", "speaker", "style"), "task=all|generation recognise|page")
    RANGES = {"ties": (0, 1), "resamples": (100, 1_000_000), "workers": (0, 1000), "prompts": (1, config.MOST),
              "prompt_seconds": (config.ABOVE_0, 1e6), "max_new_units": (1, config.MOST), "top_k": (1, config.MOST),
              "top_p": (config.ABOVE_0, 1), "temperature": (0, 1e6)}


# ---------------------------------------------------------------------------------------------- who is measured

@dataclass(frozen=True)
class SpeechLM:
    name: str  # as the user gave it
    model: torch.nn.Module
    vocab: twist.UnitVocab
    bos: bool  # whether the beginning token is given

    def encode(self, units, eos):
        return self.vocab.encode(units, bos=self.bos, eos=eos)


def of_option(option, function, *arguments):
    """function(*arguments) about a language model; if there is no such thing, the option that names it is said."""
    try:
        return function(*arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(re.sub("^--(model|lm)=", f"--{option}=", str(error))) from None


def load_model(option, options, dtype, device):
    name = getattr(options, option)
    model, vocab = of_option(option, twist.load_speech_lm, name, dtype, device)
    if options.bos == "yes" and vocab.bos is None:
        raise ValueError(f"--bos=yes, but {name} has no beginning token; use --bos=auto")
    if options.eos and vocab.eos is None:
        raise ValueError(f"--eos, but {name} has no ending token; leave it out")
    return SpeechLM(name, model, vocab, vocab.bos is not None and options.bos != "no")


class Evaluation:
    """What all tasks share: options, processes, models, and what is loaded when it is first needed."""

    def __init__(self, options, dist):
        self.options, self.dist, self.page = options, dist, None
        if options.page and dist.is_main:
            from pages.listening import Page  # nothing else needs it

            self.page = Page(options.out, options.page)
        names = ["model"] + ["versus"] * bool(options.versus)
        parameters = sum(of_option(name, twist.count_parameters, getattr(options, name)) for name in names)
        free = min(dist.each(free_memory(dist.device, distributed.local_world(dist))))  # all processes take the same dtype
        self.weights, self.why = weights_dtype(options.dtype, dist.device, parameters, free)
        self.lms = {name: load_model(name, options, DTYPES[self.weights], dist.device) for name in names}
        self.main = self.lms["model"]
        if options.versus:
            first, second = (lm.vocab for lm in self.lms.values())
            if first.knows_recipe and second.knows_recipe:
                self.check(second.recipe, f"--versus={options.versus}")
            if first.num_units != second.num_units:
                raise ValueError(f"--versus={options.versus} knows {second.num_units} units, --model={options.model} "
                                 f"{first.num_units}; only models of the same units compare")
        self.window = min(lm.model.config.block_size for lm in self.lms.values())

    # ---- units

    def check(self, recipe, where):
        """Raise ValueError if units of this recipe are not those that the model was trained on."""
        check_recipe(recipe, self.main.vocab.expected(recipe), where)

    @functools.cached_property
    def encoder(self):
        device = torch.device(config.beside(self.dist.device))
        encoder = hubert_units.load_tokenizer(self.options, self.main.vocab.recipe, device)
        self.check({**encoder.recipe, "dedup": self.main.vocab.dedup}, f"--tokenizer={self.options.tokenizer}")
        encoder.budget = BUDGET_SECONDS[device.type]
        return encoder

    def encode(self, files):
        """Recordings -> UnitShards, from the cache if they were encoded before; an interrupted encoding goes on."""
        dedup = self.main.vocab.dedup
        key = hashlib.sha256(json.dumps([self.encoder.recipe, dedup, [(file, *stamp(file)) for file in files]]).encode())
        base = Path(self.options.cache) if self.options.cache else download.cache("NANOTWIST_HOME") / "units"
        folder = base / key.hexdigest()[:16]
        how = hubert_units.UnitsConfig(out=str(folder), workers=self.options.workers, dedup=dedup)
        inside = {*names_in(folder)}
        with packed(self.encoder):
            encode_files([file for file in files if file not in inside], self.encoder, how, self.dist)
        self.dist.barrier()  # the first process joins the shards
        return UnitShards(folder)

    def shards(self, folder):
        """A folder of unit shards or of recordings."""
        if not (Path(folder) / "meta.json").exists():
            said = recognise(folder)
            try:
                if said and Path(folder).is_file():
                    raise ValueError
                files = find_audio([folder], quiet=not self.dist.is_main)
            except ValueError as error:
                raise ValueError(f"--data={folder} {said}" if said else error) from None
            return self.encode([str(file) for file in files])
        found = UnitShards(folder)
        self.check(found.recipe, str(folder))
        return found

    @functools.cached_property
    def counts(self):
        """UnitCounts of the training shards, and a sentence why not if there are none."""
        folder = self.options.train_data
        if folder != "pocket" and not Path(folder).exists():
            raise FileNotFoundError(f"--train-data={folder}: no such folder; give one of unit shards, or `pocket`")
        shards = UnitShards(find("pocket", "units") / "train" if folder == "pocket" else folder)
        try:
            self.check(shards.recipe, f"--train-data={folder}")
        except ValueError:
            if folder != "pocket":
                raise
            return None, f"no unigram and bigram: name shards of the units that {self.main.name} was trained on with --train-data"
        return UnitCounts(shards, self.main.vocab.num_units, self.options.eos), ""

    # ---- log-probabilities

    def log_probabilities(self, documents, cut=None):
        """{system: list of (targets,) arrays} for documents, a list of units (T,). cut: targets that are scored at most."""
        (counts, _), options, found = self.counts, self.options, {}  # the counts first: what is wrong with --train-data shows
        for system, lm in self.lms.items():
            rows = [lm.encode(units, options.eos)[:None if cut is None else cut + 1] for units in documents]
            found[system] = log_probabilities(lm.model, rows, self.dist, options.stride, options.budget, f"scoring by {system}")
        for order, system in ((2, "bigram"), (1, "unigram")) if counts else ():
            found[system] = [counts.log_probabilities(units, order, self.main.bos, options.eos)[:cut] for units in documents]
        return found

    def load_vocoder(self):
        """The one that speaks the units of the model, in a voice that it has."""
        vocoder = load_vocoder(self.options.vocoder)
        vocoder.voice(self.options.speaker, self.options.style)
        if vocoder.recipe:
            check_recipe(vocoder.recipe, self.main.vocab.expected(vocoder.recipe), f"--vocoder={self.options.vocoder}",
                         but=("dedup", "precision"))
        return vocoder.to(config.beside(self.dist.device))

    def text_scorer(self):
        """What a token of --text-lm is, and a function: texts -> [(nats, tokens)]. It loads the model, which is checked here."""
        folder = of_option("text-lm", find_model, self.options.text_lm, "lm")
        token, ids_of = transcripts.open_tokenizer(folder, self.options.text_lm, self.options.text_tokenizer)
        dtype, _ = weights_dtype(self.options.dtype, "cpu", twist.count_parameters(folder))

        def score(texts):
            rows = [torch.tensor(ids_of(text), dtype=torch.int64) for text in texts]
            alone = distributed.Dist(0, 1, torch.device("cpu"))
            scored = log_probabilities(twist.load_text_lm(folder, DTYPES[dtype]), rows, alone, label="transcripts")
            return [(float(values.sum()), len(values)) for values in scored]

        return reports.shown(token, dtype), score


def stamp(path):
    """Size and date of a file, or of the zip that it stands in: when they change, its units are computed again."""
    found = Path(path)
    while not found.exists():
        found = found.parent
    return found.stat().st_size, found.stat().st_mtime_ns


# ---------------------------------------------------------------------------------------------- the command

def conventions_of(evaluation, ran):
    """How the numbers came about, a sentence each. ran: the functions of the tasks; others' conventions are left out."""
    options, of_pairs = evaluation.options, pairs.run in ran
    given = {system: "given and not scored" if lm.bos else "not given, the first unit is not scored"
             for system, lm in evaluation.lms.items()}
    if ran == {generation.run}:
        return []
    found = ["beginning token: " + (given["model"] if len(set(given.values())) == 1 else str(given)),
             f"ending token: {'scored' if options.eos else 'not scored'}"]
    if of_pairs:
        found[:0] = [f"log-likelihood: {options.norm} over {'units' if options.norm == 'mean' else 'all units'}, in float32"
                     + f" from logits in {evaluation.weights}" * (evaluation.weights != "float32") + "; "
                     + ("the whole sequence" if options.score == "whole" else "the ending only, given what is before it")]
        found += [f"ties count {options.ties:g}; split {options.split} (sLM21); voices: {', '.join(options.voices) or 'all'}"]
    drawn = " and ".join(["questions (`all`: their mean, of each over voices)"] * of_pairs
                         + ["documents (ppl)"] * (perplexity.run in ran))
    return [*found, f"intervals: 95 %, bootstrap over {drawn}, {options.resamples} resamples, seed {options.seed}"
            + ("; p: sign-flip test of paired differences, two-sided" if options.versus else ""),
            f"unigram, bigram: add-0.1 smoothing, fitted to {options.train_data}"
            + ("; length: the sequence of fewer units wins" if of_pairs else "")]


def tasks_of(evaluation):
    """What is to be done, in order: functions that give a section each."""
    options, held_out = evaluation.options, find("pocket", "units") / "val"
    pocket, folder = options.data in (None, "pocket"), Path(options.data or "pocket")
    if options.task in ("ppl", "generation"):
        run = perplexity.run if options.task == "ppl" else generation.run
        return [functools.partial(run, evaluation, held_out if pocket else folder)]
    found, shards = [], pocket or (folder / "meta.json").exists()
    if options.task == "all" and shards:
        folder = held_out if pocket else folder
        found = [functools.partial(run, evaluation, folder) for run in (perplexity.run, generation.run)]
    if pocket and options.task == "all" and not POCKET_BENCHMARKS.exists():
        return found
    if options.task != "all" or pocket or not shards:
        where = POCKET_BENCHMARKS if pocket else folder
        found += [functools.partial(pairs.run, evaluation, benchmark)
                  for benchmark in sets.find(options.task, where, options.split, options.voices)]
    return found


def report(sections, conventions, systems, options):
    reports.write(options.out, sections, conventions, systems, options)
    print(reports.text_of(sections, conventions, systems))
    if options.published:
        print("\n" + PUBLISHED.read_text())
    print(f"\nwrote {options.out}/result.json, result.csv")


def main(argv=None):
    options = config.load(EvalConfig, argv)
    if options.task == "mmos":  # of listeners, no model is asked
        return report(opinion.run(options), opinion.CONVENTIONS, {}, options)
    dist = distributed.setup(options.device, timedelta(days=30))  # encoding may take one process longer than another
    evaluation = Evaluation(options, dist)
    if dist.is_main:
        print(evaluation.why)
    tasks = tasks_of(evaluation)
    sections = [section for run in tasks if (section := run())]
    if dist.is_main:
        systems = {system: f"{lm.name}, window {lm.model.config.block_size}, weights in {evaluation.weights}"
                   for system, lm in evaluation.lms.items()}
        reports.label(sections, systems, evaluation.weights)
        conventions = conventions_of(evaluation, {task.func for task in tasks})
        report(sections, conventions, systems, options)
        if evaluation.page and evaluation.page.sections:
            told = [(name, getattr(options, name)) for name in ("model", "versus", *speaking.SAMPLING, *speaking.VOICE)]
            print(f"wrote {evaluation.page.write('Held-out speech, and how the models go on', told)}")
    dist.barrier()
    distributed.leave()


if __name__ == "__main__":
    config.command(main)
