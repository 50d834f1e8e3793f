"""How well a speech LM predicts the next unit of held-out recordings: perplexity, nats per unit, bits per second.

    shards --log p of every unit, by each system--> sums of each document --ratio of sums, bootstrap--> rows of the table

Documents (D of them) are what the bootstrap draws. Seconds are those of the audio, zeros for text.
"""
from pathlib import Path

import numpy as np

from evaluation import accuracy, reports


def run(evaluation, folder):
    """Perplexity, loss and bits of one folder -> its section of the result."""
    options, shards = evaluation.options, evaluation.shards(folder)
    documents = [shards.document(i)[0] for i in range(len(shards))]
    found = evaluation.log_probabilities(documents)
    if not evaluation.dist.is_main:
        return None
    seconds = np.array([file["seconds"] for file in shards.each_file()])
    name, rows, scored = f"ppl {Path(folder).name}", [], {}
    for system, values in found.items():
        units = np.array([len(part) for part in values], dtype=np.float64)
        kept = units > 0
        nats = np.array([-part.sum() for part in values])[kept]
        scored[system] = [(nats, units[kept])]
        mean = accuracy.estimate(scored[system], options.resamples, options.seed)
        rows += [reports.row(name, "perplexity", system, "per unit", mean.through(np.exp)),
                 reports.row(name, "loss", system, "nats per unit", mean)]
        if seconds.sum():
            bits = accuracy.estimate([(nats / np.log(2), seconds[kept])], options.resamples, options.seed)
            rows.append(reports.row(name, "bits of speech", system, "per second", bits))
        if system == "versus" and evaluation.main.bos == evaluation.lms["versus"].bos:  # else they score different units
            apart = accuracy.difference(scored["model"], scored["versus"], options.resamples, options.seed)
            rows.append(reports.row(name, "loss", "model - versus", "nats per unit", apart))
    notes = [note for note in (evaluation.counts[1], "bits per second count units, not how long each lasts") if note]
    longer = sum(len(units) > evaluation.window for units in documents)
    if longer:
        notes.append(f"{longer} of {len(documents)} documents are longer than the window of {evaluation.window} units: scored by "
                     f"a sliding window in steps of {options.stride or evaluation.window // 2}")
    return {"title": f"perplexity of recordings, {folder}: {len(documents):,} documents, {int(shards.lengths.sum()):,} units, "
                     f"{seconds.sum() / 3600:.2f} h", "notes": notes, "rows": rows}
