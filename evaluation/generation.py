"""What generated speech looks like in numbers: repetition, diversity, length; and the perplexity of its transcripts.

    held-out document --its beginning--> prompt --generate--> units --> auto-BLEU, distinct n-grams, lengths
    transcripts that the user brings --> the same over words, and GenPPL by a text LM (no speech recogniser in here)

auto-BLEU(n) of one sequence is the share of its n-grams that occur in it more than once: babble that repeats itself is likely
under any language model, so a low GenPPL means nothing without it. distinct-n is the number of different n-grams over the
number of all, the continuations taken together.

GenPPL = exp(mean over transcripts of their mean negative log-likelihood per token), the token being that of whoever scores:
either the file gives a log-probability (nats) and a number of tokens for each text, from any model, or a text LM over bytes
(the pocket's) reads the bytes; perplexity per byte and per token of a 128 K vocabulary are different things.

Sources: auto-BLEU, Lakhotia et al. 2021 (arXiv 2102.01192), section on generation metrics; GenPPL as in Slam (arXiv 2502.15814).
"""
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from checkpoints.files import write_beside
from evaluation import reports
from evaluation.accuracy import Estimate
from model import generate

ROWS = 128  # prompts that are continued together
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")  # letters and digits, with apostrophes inside


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
    """How the first `count` documents that are long enough begin, and what follows there: [(name, prompt (T,), rest)] in units.

    T is the same for all, so that they are continued together: the units of so many seconds at the folder's average rate.
    """
    total = shards.meta["hours"] * 3600
    T = round(seconds * int(shards.lengths.sum()) / total) if total else 0
    if T < 1:
        raise ValueError(f"{shards.folder}: no unit is spoken in {seconds:g} s; raise --prompt-seconds, or give units of speech")
    longer = ((name, units[:T], units[T:]) for name, units, _ in shards if len(units) > T)
    found = list(itertools.islice(longer, count))
    if not found:
        raise ValueError(f"{shards.folder} has no document longer than a prompt of {T} units; lower --prompt-seconds")
    return found


def continue_all(model, vocab, prompts, options):
    """New units of each prompt, a list of (n,) arrays. options: max_new_units, temperature, top_k, top_p, seed."""
    device, results = model.wte.weight.device, []
    generator = torch.Generator(device).manual_seed(options.seed)
    for begin in range(0, len(prompts), ROWS):
        ids = torch.stack([vocab.encode(prompt, bos=vocab.bos is not None) for _, prompt, _ in prompts[begin:begin + ROWS]])
        room = min(options.max_new_units, model.config.block_size - ids.shape[1])
        if room < 1:
            raise ValueError(f"prompts of {ids.shape[1]} units fill the model's context of {model.config.block_size}; "
                             "lower --prompt-seconds")
        rows = generate(model, ids.to(device), room, options.temperature, options.top_k, options.top_p, generator, eos=vocab.eos,
                        banned=vocab.banned)
        results += [vocab.decode(row).numpy() for row in rows[:, ids.shape[1]:].cpu()]
    return results


def read_transcripts(path):
    """A .jsonl of {"name", "text"} or lines of name<TAB>text -> texts, and of each (nats, tokens) or None.

    nats, tokens: the text's log-probability and number of tokens under any text LM: keys `log_probability` and `tokens`, or two
    more columns; None where the file has neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--transcripts={path}: no such file")
    texts, scored = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as such") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".jsonl":
                row = json.loads(line)
                _, text, nats, tokens = row["name"], row["text"], row.get("log_probability"), row.get("tokens")
            else:
                _, text, *numbers = line.split("\t")
                nats, tokens = map(float, numbers[:2]) if numbers else (None, None)
            if not isinstance(text, str) or (nats is None) != (tokens is None) or (nats is not None and not (nats <= 0 < tokens)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected name and text, and either nothing more or log_probability (nats, "
                             'at most 0) and tokens; as {"name": ..., "text": ...} in a .jsonl, else divided by tabs') from None
        texts.append(text)
        scored.append(None if nats is None else (nats, tokens))
    if not texts:
        raise ValueError(f"{path} holds no transcripts")
    if None in scored and any(scored):
        raise ValueError(f"{path}: some transcripts have a log_probability and some have none; give all or none")
    return texts, scored


def run(evaluation, folder):
    """Continuations of held-out prompts, beside what really follows; and transcripts, if the user brings some."""
    options = evaluation.options
    brought = read_transcripts(options.transcripts) if options.transcripts else None  # what is wrong with them shows at once
    shards = evaluation.shards(folder)
    if not evaluation.dist.is_main:
        return None
    prompts = prompts_of(shards, options.prompts, options.prompt_seconds)
    spoken = {system: continue_all(lm.model, lm.vocab, prompts, options) for system, lm in evaluation.lms.items()}
    most = max(len(units) for units in spoken["model"])
    spoken["held-out speech"] = [rest[:most] for _, _, rest in prompts]
    found = [("units", system, len(sequences), describe(sequences)) for system, sequences in spoken.items()]
    lines = [json.dumps({"units": [int(unit) for unit in (*prompt, *more)], "file_name": f"{Path(source).stem}.wav"}) + "\n"
             for (source, prompt, _), more in zip(prompts, spoken["model"])]
    write_beside(Path(options.out) / "continuations.jsonl", "".join(lines))
    if brought:
        texts, scored = brought
        token = "token of the file's own model"
        if None in scored:
            token, scored = evaluation.score_bytes(texts)
        losses = [-nats / tokens for nats, tokens in scored if tokens]  # an empty transcript has none
        perplexity = float(np.exp(np.mean(losses))) if losses else None
        words = [WORD.findall(text.lower()) for text in texts]
        found.append(("words", "model", len(texts), {**describe(words), f"GenPPL per {token}": perplexity}))
    rows = [reports.row(f"generation {Path(folder).name}", subset, system, measure, Estimate(value, None, None, count))
            for subset, system, count, numbers in found for measure, value in numbers.items()]
    note = (f"prompts and continuations: {options.out}/continuations.jsonl, for python vocoder.py, a recogniser of yours, "
            "and --transcripts")
    notes, room = [note], evaluation.window - len(prompts[0][1]) - (evaluation.main.vocab.bos is not None)
    if room < options.max_new_units:
        notes.append(f"at most {room} new units, not --max-new-units={options.max_new_units}: with the prompt they fill the "
                     f"window of {evaluation.window} ids")
    return {"title": f"generation: {len(prompts)} prompts of {len(prompts[0][1])} units ({options.prompt_seconds:g} s) from "
                     f"{folder}, temperature {options.temperature:g}", "notes": notes, "rows": rows}
