"""What generated speech looks like in numbers: repetition, diversity, length; what is understood of it, and how likely that is.

    held-out document --its beginning--> prompt --generate--> units --> auto-BLEU, distinct n-grams, lengths
      --speaking.py--> wavs --transcripts.py: a recogniser of the user's--> words --> the same over words, GenPPL, word error

auto-BLEU(n) of one sequence is the share of its n-grams that occur in it more than once: babble that repeats itself is likely
under any language model, so a low GenPPL means nothing without it. distinct-n is the number of different n-grams over the
number of all, the continuations taken together.

GenPPL = exp(mean over transcripts of their mean negative log-likelihood per token), the token being that of whoever scores:
either the transcripts come with a log-probability (nats) and a number of tokens each, from any model, or --text-lm reads them;
perplexity per byte and per token of a 128 K vocabulary are different things.

Word error is that of re-synthesis, units -> speech: what is lost before any language model speaks. It is held against what was
said (--references) and, where the recordings are at hand, against what is heard in those; the originals against what was said are
the recogniser's own errors. Errors of all recordings over the words of all references; references without a word are left out.

Sources: auto-BLEU, Lakhotia et al. 2021 (arXiv 2102.01192), section on generation metrics; GenPPL as in Slam (arXiv 2502.15814).
"""
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from checkpoints.files import write_beside
from evaluation import accuracy, reports, speaking, transcripts
from evaluation.accuracy import Estimate
from evaluation.speaking import HELD_OUT, ORIGINAL, WHOLE
from model import generate
from speech.audio import SAMPLE_RATE

ROWS = 128  # prompts that are continued together


def ngrams(sequence, n):
    return [tuple(sequence[i:i + n]) for i in range(len(sequence) - n + 1)]


def auto_bleu(sequence, n=2):
    """Share of the n-grams of a sequence that occur more than once in it; None if it has none."""
    counts = Counter(ngrams(sequence, n))
    return sum(count for count in counts.values() if count > 1) / counts.total() if counts else None


def distinct(sequences, n):
    """Different n-grams over all n-grams of several sequences; None if they have none."""
    counts = Counter(gram for sequence in sequences for gram in ngrams(sequence, n))
    return len(counts) / counts.total() if counts else None


def describe(sequences):
    """Repetition, diversity and lengths of a list of sequences (units, or words), as {name: number}."""
    bleu = [value for value in map(auto_bleu, sequences) if value is not None]
    lengths = [len(sequence) for sequence in sequences]
    return {"auto_bleu_2": float(np.mean(bleu)) if bleu else None,
            **{f"distinct_{n}": distinct(sequences, n) for n in (1, 2, 3, 4)},
            "length_mean": float(np.mean(lengths)), "length_median": float(np.median(lengths)),
            "length_min": min(lengths), "length_max": max(lengths)}


def prompts_of(shards, count, seconds):
    """The first `count` documents that are longer than a prompt, {name: (file_name, units, runs)}, and the T units of a prompt.

    T is the same for all, so that they are continued together: the units of so many seconds at the folder's average rate. The
    name is that of the file, without folder and ending; of two of one name the second is called NAME_2.
    """
    total = shards.meta["hours"] * 3600
    T = round(seconds * int(shards.lengths.sum()) / total) if total else 0
    if T < 1:
        raise ValueError(f"{shards.folder}: no unit is spoken in {seconds:g} s; raise --prompt-seconds, or give units of speech")
    found = {}
    for source, *document in itertools.islice((each for each in shards if len(each[1]) > T), count):
        names = (f"{Path(source).stem}_{copy}".removesuffix("_1") for copy in itertools.count(1))
        found[next(name for name in names if name not in found)] = (source, *document)
    if not found:
        raise ValueError(f"{shards.folder} has no document longer than a prompt of {T} units; lower --prompt-seconds")
    return found, T


def continue_all(model, vocab, prompts, options):
    """New units of each of the prompts (T,), a list of (n,) arrays. options: max_new_units, temperature, top_k, top_p, seed."""
    device, results = model.wte.weight.device, []
    generator = torch.Generator(device).manual_seed(options.seed)
    for begin in range(0, len(prompts), ROWS):
        ids = torch.stack([vocab.encode(prompt, bos=vocab.bos is not None) for prompt in prompts[begin:begin + ROWS]])
        room = min(options.max_new_units, model.config.block_size - ids.shape[1])
        if room < 1:
            raise ValueError(f"prompts of {ids.shape[1]} units fill the model's context of {model.config.block_size}; "
                             "lower --prompt-seconds")
        rows = generate(model, ids.to(device), room, options.temperature, options.top_k, options.top_p, generator, eos=vocab.eos,
                        banned=vocab.banned)
        results += [vocab.decode(row).numpy() for row in rows[:, ids.shape[1]:].cpu()]
    return results


def rows_of(name, subset, system, count, numbers):
    """{measure: number} of one system -> rows without an interval."""
    return [reports.row(name, subset, system, measure, Estimate(value, None, None, count)) for measure, value in numbers.items()]


def describe_words(name, said, scorer):
    """Rows of the words that each system said, but for whole documents.

    Args: said: {system: [Transcript]}. scorer: what a token is and a function, texts -> [(nats, tokens)]; None if they have them.
    """
    found, said = [], {system: each for system, each in said.items() if system not in (WHOLE, ORIGINAL)}
    every = [each for some in said.values() for each in some]
    token, score = scorer or ("token of the file's own model", None)
    scored = iter(score([each.text for each in every]) if score else [each.scored for each in every])
    for system, some in said.items():
        losses = [-nats / tokens for nats, tokens in itertools.islice(scored, len(some)) if tokens]  # an empty text has none
        perplexity = {f"GenPPL per {token}": float(np.exp(np.mean(losses))) if losses else None}
        numbers = describe([transcripts.words_of(each.text) for each in some])
        found += rows_of(name, "words", system, len(some), numbers | perplexity)
    return found


def describe_errors(name, said, references, options):
    """Rows of the word error of originals and re-synthesis. said: as above; references: {document: text}."""
    found, texts = [], {system: {each.name: each.text for each in some} for system, some in said.items()}
    for system, against, known in ((ORIGINAL, "what was said", references), (WHOLE, "what was said", references),
                                   (WHOLE, "what is heard in the original", texts.get(ORIGINAL, {}))):
        pairs = [(transcripts.words_of(known[document]), transcripts.words_of(text))
                 for document, text in texts.get(system, {}).items() if document in known]
        counts = np.array([(*transcripts.word_errors(*pair), len(pair[0])) for pair in pairs if pair[0]], dtype=np.float64)
        if not len(counts):
            continue
        subset, words = f"word error, against {against}", counts[:, 3]
        rate = accuracy.estimate([(counts[:, :3].sum(1), words)], options.resamples, options.seed)
        found.append(reports.row(name, subset, system, "%", rate.through(lambda share: 100 * share)))
        parts = {f"% {part}": float(100 * each.sum() / words.sum())
                 for part, each in zip(("substitutions", "deletions", "insertions"), counts.T)}
        found += rows_of(name, subset, system, len(counts), {**parts, "words": float(words.sum())})
    return found


def listen(options, spoken):
    """What is spoken is recognised -> Transcripts, and a sentence about what was heard."""
    texts = transcripts.recognise(options.recognise, [each.path for each in spoken], options.workers)
    found = [transcripts.Transcript(each.system, each.name, text) for each, text in zip(spoken, texts) if text is not None]
    lines = [json.dumps({"system": each.system, "name": each.name, "text": each.text}) + "\n" for each in found]
    write_beside(Path(options.out) / "transcripts.jsonl", "".join(lines))
    return found, (f"heard by `{options.recognise}`: {len(found)} of {len(spoken)} recordings in {options.out}/spoken"
                   + (f", the other {len(spoken) - len(found)} could not be recognised" if len(found) < len(spoken) else "")
                   + f"; {options.out}/transcripts.jsonl is for --transcripts. Words are those of prompt and continuation")


def run(evaluation, folder):
    """Continuations of held-out prompts, beside what really follows; and what a recogniser hears in them, here or before."""
    options, said, references, scorer, vocoder = evaluation.options, [], {}, None, None
    if options.recognise and options.transcripts:
        raise ValueError("--recognise makes transcripts and --transcripts brings some; give one of them")
    if options.transcripts:  # what is wrong with them, and with all that follows here, shows before the work begins
        said = transcripts.read_transcripts(options.transcripts)
    if options.recognise:
        transcripts.parse_command(options.recognise)
    if options.recognise or options.page:
        vocoder = evaluation.load_vocoder()
    if options.recognise or said and not said[0].scored:
        scorer = evaluation.text_scorer()
    if options.references and (options.recognise or said):
        references = transcripts.read_references(options.references)
    shards = evaluation.shards(folder)
    if not evaluation.dist.is_main:
        return None
    name, (documents, T) = f"generation {Path(folder).name}", prompts_of(shards, options.prompts, options.prompt_seconds)
    stems = Counter(Path(source).stem for source, *_ in documents.values())
    if twice := [stem for stem, count in stems.items() if count > 1 and stem in references]:
        raise ValueError(f"--references={options.references} has one text of {twice[0]}, and two documents are called so")
    if references and not references.keys() & documents:
        raise ValueError(f"--references={options.references} has no text of any of the {len(documents)} documents, such as "
                         f"{next(iter(documents))}; names count without folder and ending")
    prompts = [units[:T] for _, units, _ in documents.values()]
    sequences = {system: continue_all(lm.model, lm.vocab, prompts, options) for system, lm in evaluation.lms.items()}
    most = max(len(units) for units in sequences["model"])
    sequences[HELD_OUT] = [units[T:T + most] for _, units, _ in documents.values()]
    lines = [json.dumps({"units": [int(unit) for unit in (*prompt, *more)], "file_name": f"{document}.wav"}) + "\n"
             for document, prompt, more in zip(documents, prompts, sequences["model"])]
    write_beside(Path(options.out) / "continuations.jsonl", "".join(lines))
    notes = [f"prompts and continuations: {options.out}/continuations.jsonl, for python vocoder.py, a recogniser of yours, and "
             "--transcripts; --recognise does all of it"]
    room = evaluation.window - T - (evaluation.main.vocab.bos is not None)
    if room < options.max_new_units:
        notes.append(f"at most {room} new units, not --max-new-units={options.max_new_units}: with the prompt they fill the "
                     f"window of {evaluation.window} ids")
    if vocoder:
        originals = not (Path(folder) / "meta.json").exists()  # recordings are at hand, not shards
        whole = [document for document in documents if originals or document in references]
        spoken = speaking.speak(evaluation, vocoder, documents, sequences, T, whole, originals)
        speaking.show(evaluation, spoken, vocoder.config.code_hop_size / SAMPLE_RATE)
    if options.recognise:
        said, notes[0] = listen(options, spoken)
    by_system = {system: [each for each in said if each.system == system] for system in dict.fromkeys(x.system for x in said)}
    if references:
        notes.append(f"--references has a text of {len(references.keys() & documents)} of the {len(documents)} documents"
                     + ("" if WHOLE in by_system else ", but no transcript is of a whole document"))
    rows = [row for system, each in sequences.items() for row in rows_of(name, "units", system, len(each), describe(each))]
    rows += describe_words(name, by_system, scorer)
    if errors := describe_errors(name, by_system, references, options):
        notes.append(f"intervals: 95 %, bootstrap over recordings, {options.resamples} resamples, seed {options.seed}")
    rows += errors
    return {"title": f"generation: {len(prompts)} prompts of {T} units ({options.prompt_seconds:g} s) from {folder}, temperature "
                     f"{options.temperature:g}", "notes": notes, "rows": rows}
