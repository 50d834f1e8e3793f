"""A benchmark's pairs and the log-probabilities of their documents -> scores, and the accuracy of every subset and system.

    log p of each unit --mean or sum, whole or ending--> score of a sequence --positive against negative--> outcome of a pair
    outcomes --micro, macro over types, by voice, by label; accuracy.py--> rows of the table

An ending is what follows the seconds that pairs.csv names, or else the units that both of a pair begin with: where one voice
reads one story with two endings, most of the context is the same in both, and says nothing. Under a summed log-likelihood that
common part cancels anyway; under the mean it dilutes.
"""
import itertools

import numpy as np

from evaluation import accuracy, reports, sets


def starts_of(pair, units, runs, frame_rate):
    """Index of the first unit of each ending: as the benchmark says in seconds, or behind what both have in common."""
    if None not in pair.starts:
        return [np.searchsorted(np.cumsum(frames), seconds * frame_rate, side="right")
                for frames, seconds in zip(runs, pair.starts)]
    n = min(map(len, units))  # the place of the first difference, or n
    return [np.append(units[0][:n] != units[1][:n], True).argmax()] * 2


def likelihood(log_probabilities, norm, start=0):
    """Nats of the targets (n,) from `start` on, but at least of the last -> the score of a sequence."""
    scored = log_probabilities[min(start, len(log_probabilities) - 1):]
    return float(scored.mean() if norm == "mean" else scored.sum())


def score(evaluation, pairs, shards):
    """Scores of both sides of every pair, by every system.

    Args: evaluation: eval.Evaluation. shards: UnitShards that hold the documents of the pairs.
    Returns: {system: (positive (N,), negative (N,))}; {document: its units}; sentences for the reader.
    """
    options, notes, scores = evaluation.options, [], {}
    sides = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    wanted = set().union(*sides)
    held = {name: shards.document(i) for i, name in enumerate(shards.names) if name in wanted}
    names = sorted(held)
    lengths = {name: len(held[name][0]) for name in names}
    extra = evaluation.main.bos + options.eos - 1  # targets of a document, less its units
    longer = sum(length + extra > evaluation.window for length in lengths.values())
    cut = evaluation.window if options.long == "truncate" else None
    if longer:
        notes.append(f"{longer} of {len(names)} sequences are longer than the window of {evaluation.window} units, and "
                     + ("cut off there; --long=slide scores all of them" if cut else "scored by a sliding window"))
    if longer and cut and options.score == "ending":
        raise ValueError(f"--score=ending: {longer} sequences are cut off before or in their endings; add --long=slide")
    starts = np.zeros((len(pairs), 2), dtype=np.int64)
    if options.score == "ending":
        for row, pair in zip(starts, pairs):
            row[:] = starts_of(pair, *zip(held[pair.positive], held[pair.negative]), shards.recipe["frame_rate"])
        whole = sum(lengths[name] for side in sides for name in side)
        notes.append(f"endings: {1 - starts.sum() / whole:.0%} of all units are scored")
    for system, values in evaluation.log_probabilities([held[name][0] for name in names], cut).items():
        first = 1 - evaluation.lms.get(system, evaluation.main).bos  # without a beginning token the first unit is no target
        nats = dict(zip(names, values))
        scores[system] = tuple(np.array([likelihood(nats[name], options.norm, max(0, start - first))
                                         for name, start in zip(side, begins)]) for side, begins in zip(sides, starts.T))
    scores["length"] = tuple(np.array([-float(lengths[name]) for name in side]) for side in sides)
    return scores, lengths, notes


def subsets(pairs):
    """What is averaged, in the order of the table: (name, mask (N,), types or None, way)."""
    everything, labels = np.ones(len(pairs), dtype=bool), [{"voice": pair.voice, **pair.labels} for pair in pairs]
    found, rank = [("all", everything, None, "micro")], {band: i for i, band in enumerate(sets.BANDS)}
    said = {label: [each.get(label) for each in labels] for label in dict.fromkeys(itertools.chain(*labels))}
    said = {label: values for label, values in said.items() if len(set(values) - {None}) > 1}  # labels that divide the pairs
    if "type" in said:
        found.append(("macro over types", everything, [value or "" for value in said["type"]], "micro"))
    if "voice" in said:
        found += [("per recording", everything, None, "recordings"), ("all voices right", everything, None, "strict")]
    for label, values in said.items():
        names = sorted(set(values) - {None, ""}, key=lambda name: (rank.get(name, 0), name))
        found += [(f"{label} = {name}", np.array([value == name for value in values]), None, "micro") for name in names]
    return found


def accuracy_rows(benchmark, pairs, scores, options):
    """Rows of the result: every subset and system, and differences of two models."""
    items, name, rows = np.array([pair.item for pair in pairs]), f"{benchmark.task} {benchmark.name}", []
    outcomes = {system: accuracy.outcomes(*sides, options.ties) for system, sides in scores.items()}
    for subset, mask, types, way in subsets(pairs):
        strata = {system: accuracy.stratify(values[mask], items[mask], types, way) for system, values in outcomes.items()}
        estimates = {}
        for system, found in strata.items():
            estimates[system] = accuracy.estimate(found, options.resamples, options.seed)
            if system == "versus":
                estimates["model - versus"] = accuracy.difference(strata["model"], found, options.resamples, options.seed)
        rows += [reports.row(name, subset, system, "%", estimate.through(lambda share: 100 * share))
                 for system, estimate in estimates.items()]
    return rows


def row_order(benchmark, scores, score_of, ties):
    """The official scorer of sBLIMP pairs rows by their order, not by id: whether that is the same, and what it changes."""
    by_id = {(pair.positive, pair.negative) for pair in benchmark.pairs}
    differ = [pair for pair in benchmark.row_order if pair not in by_id]
    if not differ:
        return "pairing by id and by the official row order agree"
    known = [(score_of[a], score_of[b]) for a, b in benchmark.row_order if a in score_of and b in score_of]
    flat, ours = accuracy.outcomes(*zip(*known), ties), accuracy.outcomes(*scores, ties)
    return (f"{len(differ)} of {len(benchmark.row_order)} pairs are others in the official row order, by which the model has "
            f"{100 * flat.mean():.2f} % per recording, against {100 * ours.mean():.2f} % by id")


def run(evaluation, benchmark):
    """One benchmark -> its section of the result."""
    options = evaluation.options
    if benchmark.units:
        shards = evaluation.shards(benchmark.units)
    else:
        present = {name for pair in benchmark.pairs for name in (pair.positive, pair.negative)} & benchmark.present
        sets.complete_pairs(benchmark, present)  # too much is missing: say so before encoding
        shards = evaluation.encode(sorted(present))
    shortest = 2 - all(lm.bos or options.eos for lm in evaluation.lms.values())  # units of which one is scored
    short = {name for name, length in zip(shards.names, shards.lengths) if length < shortest}
    pairs, missing, sentence = sets.complete_pairs(benchmark, set(shards.names) - short)
    scores, lengths, notes = score(evaluation, pairs, shards)
    notes = [note for note in (sentence, *notes, evaluation.counts[1]) if note]
    if missing and shards.meta["failures"]:
        notes.append(f"why recordings could not be encoded: {shards.folder}/failures.csv")
    if not evaluation.dist.is_main:
        return None
    score_of = {name: value for pair, *both in zip(pairs, *scores["model"])
                for name, value in zip((pair.positive, pair.negative), both)}
    if benchmark.row_order:
        notes.append(row_order(benchmark, scores["model"], score_of, options.ties))
    if benchmark.stems:
        reports.write_submission(options.out, benchmark, score_of)
    reports.write_scores(options.out, benchmark, pairs, scores, lengths, evaluation.weights)
    voices, items = {pair.voice for pair in pairs} - {""}, {pair.item for pair in pairs}
    ties = {system: int((a == b).sum()) for system, (a, b) in scores.items()}
    notes.append("ties: " + ", ".join(f"{count} by {system}" for system, count in ties.items()))
    title = [f"{benchmark.task}, {benchmark.name}: {len(pairs):,} pairs of {len(items):,} questions"]
    title += [f"{len(voices)} voices"] * bool(voices) + [f"split {benchmark.split}"] * bool(benchmark.split)
    return {"title": ", ".join(title), "notes": notes, "missing": missing, "ties": ties,
            "rows": accuracy_rows(benchmark, pairs, scores, options)}
