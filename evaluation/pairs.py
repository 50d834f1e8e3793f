"""A benchmark's pairs and the log-probabilities of their documents -> scores, and the accuracy of every subset and system.

    log p of each unit --mean or sum, whole or ending--> score of a sequence --positive against negative--> outcome of a pair
    outcomes --micro, macro over types, by voice, by label; accuracy.py--> rows of the table

An ending is what follows the seconds that pairs.csv names, or else the units that both of a pair begin with: where one voice
reads one story with two endings, most of the context is the same in both, and says nothing. Under a summed log-likelihood that
common part cancels anyway; under the mean it dilutes.
"""
import numpy as np

from evaluation import accuracy, reports, sets


def starts_of(pair, units, runs, frame_rate):
    """Index of the first unit of each ending: as the benchmark says in seconds, or behind what both have in common."""
    if None not in pair.starts:
        return [int(np.searchsorted(np.cumsum(frames), seconds * frame_rate, side="right"))
                for frames, seconds in zip(runs, pair.starts)]
    n = min(map(len, units))
    apart = np.flatnonzero(units[0][:n] != units[1][:n])
    return [int(apart[0]) if len(apart) else n] * 2


def likelihood(log_probabilities, norm, start=0):
    """Nats of the targets (n,) from `start` on, but at least of the last -> the score of a sequence."""
    scored = log_probabilities[min(start, len(log_probabilities) - 1):]
    return float(scored.mean() if norm == "mean" else scored.sum())


def score(evaluation, pairs, shards):
    """Scores of both sides of every pair, by every system.

    Args: evaluation: eval.Evaluation. shards: UnitShards that hold the documents of the pairs.
    Returns: {system: (positive (N,), negative (N,))}; {document: its units}; sentences for the reader.
    """
    options, notes = evaluation.options, []
    wanted = {name for pair in pairs for name in (pair.positive, pair.negative)}
    held = {name: shards.document(i) for i, name in enumerate(shards.each_name()) if name in wanted}
    names = sorted(held)
    index, documents = {name: i for i, name in enumerate(names)}, [held[name][0] for name in names]
    extra = evaluation.main.bos + options.eos - 1  # targets of a document, less its units
    longer = sum(len(units) + extra > evaluation.window for units in documents)
    cut = evaluation.window if options.long == "truncate" else None
    if longer:
        notes.append(f"{longer} of {len(documents)} sequences are longer than the window of {evaluation.window} units, and "
                     + ("cut off there; --long=slide scores all of them" if cut else "scored by a sliding window"))
    if longer and cut and options.score == "ending":
        raise ValueError(f"--score=ending: {longer} sequences are cut off before or in their endings; add --long=slide")
    found = evaluation.log_probabilities(documents, cut)
    starts = np.zeros((len(pairs), 2), dtype=np.int64)
    if options.score == "ending":
        for row, pair in zip(starts, pairs):
            row[:] = starts_of(pair, *zip(held[pair.positive], held[pair.negative]), shards.recipe["frame_rate"])
        whole = sum(len(held[name][0]) for pair in pairs for name in (pair.positive, pair.negative))
        notes.append(f"endings: {1 - starts.sum() / whole:.0%} of all units are scored")
    lengths, scores = {name: len(units) for name, units in zip(names, documents)}, {}
    for system, values in found.items():
        first = 1 - evaluation.lms.get(system, evaluation.main).bos  # without a beginning token the first unit is no target
        scores[system] = tuple(np.array([
            likelihood(values[index[name]], options.norm, max(0, start - first)) for name, start in side])
            for side in zip(*(((pair.positive, a), (pair.negative, b)) for pair, (a, b) in zip(pairs, starts))))
    scores["length"] = tuple(np.array([-float(lengths[name]) for name in side])
                             for side in zip(*((pair.positive, pair.negative) for pair in pairs)))
    return scores, lengths, notes


def subsets(benchmark, pairs):
    """What is averaged, in the order of the table: (name, way, mask (N,), types or None)."""
    everything = np.ones(len(pairs), dtype=bool)
    found = [("all", "micro", everything, None)]
    values = sets.label_values(pairs)
    if "type" in values:
        found.append(("macro over types", "micro", everything, [pair.labels.get("type", "") for pair in pairs]))
    if "voice" in values:
        found += [("per recording", "recordings", everything, None), ("all voices right", "strict", everything, None)]
    for label, names in values.items():
        said = np.array([pair.voice if label == "voice" else pair.labels.get(label, "") for pair in pairs])
        found += [(f"{label} = {name}", "micro", said == name, None) for name in names if name]
    return found


def strata_of(outcomes, items, way, mask, types):
    if types is None:
        return [accuracy.totals(outcomes[mask], items[mask], way)]
    return accuracy.divided(outcomes[mask], items[mask], np.asarray(types)[mask], way)


def accuracy_rows(benchmark, pairs, scores, options):
    """Rows of the result: every subset and system, and differences of two models."""
    items, name, rows = np.array([pair.item for pair in pairs]), f"{benchmark.task} {benchmark.name}", []
    outcomes = {system: accuracy.outcomes(*sides, options.ties) for system, sides in scores.items()}
    for subset, *chosen in subsets(benchmark, pairs):
        strata = {system: strata_of(values, items, *chosen) for system, values in outcomes.items()}
        for system, found in strata.items():
            estimate = accuracy.estimate(found, options.resamples, options.seed)
            rows.append(reports.row(name, subset, system, "%", estimate, 100))
            if system == "versus":
                apart = accuracy.difference(strata["model"], found, options.resamples, options.seed)
                rows.append(reports.row(name, subset, "model - versus", "%", apart, 100))
    return rows


def row_order(benchmark, pairs, scores, ties):
    """The official scorer of sBLIMP pairs rows by their order, not by id: whether that is the same, and what it changes."""
    by_id = {(pair.positive, pair.negative) for pair in benchmark.pairs}
    differ = [pair for pair in benchmark.row_order if pair not in by_id]
    if not differ:
        return "pairing by id and by the official row order agree"
    score_of = {name: value for pair, *both in zip(pairs, *scores) for name, value in zip((pair.positive, pair.negative), both)}
    known = [(score_of[a], score_of[b]) for a, b in benchmark.row_order if a in score_of and b in score_of]
    flat, ours = accuracy.outcomes(*zip(*known), ties), accuracy.outcomes(*scores, ties)
    return (f"{len(differ)} of {len(benchmark.row_order)} pairs are others in the official row order, by which the model has "
            f"{100 * flat.mean():.2f} % per recording, against {100 * ours.mean():.2f} % by id")


def run(evaluation, benchmark):
    """One benchmark -> its section of the result."""
    options = evaluation.options
    if benchmark.units:
        shards = evaluation.shards(benchmark.units)
        usable = set(shards.names)
    else:
        mentioned = {name for pair in benchmark.pairs for name in (pair.positive, pair.negative)}
        sets.complete_pairs(benchmark, mentioned & benchmark.present)  # too much is missing: say so before encoding
        shards = evaluation.encode(sorted(mentioned & benchmark.present))
        usable = set(shards.names)
    shortest = 2 - all(lm.bos or options.eos for lm in evaluation.lms.values())  # units of which one is scored
    usable -= {name for name, length in zip(shards.names, shards.lengths) if length < shortest}
    pairs, missing, sentence = sets.complete_pairs(benchmark, usable)
    scores, lengths, notes = score(evaluation, pairs, shards)
    notes = [*([sentence] if sentence else []), *notes, *filter(None, [evaluation.counts[1]])]
    if missing and shards.meta["failures"]:
        notes.append(f"why recordings could not be encoded: {shards.folder}/failures.csv")
    if not evaluation.dist.is_main:
        return None
    if benchmark.row_order:
        notes.append(row_order(benchmark, pairs, scores["model"], options.ties))
    if benchmark.stems:
        reports.write_submission(options.out, benchmark, pairs, scores["model"])
    reports.write_scores(options.out, benchmark, pairs, scores, lengths)
    voices, items = {pair.voice for pair in pairs} - {""}, {pair.item for pair in pairs}
    ties = {system: int((a == b).sum()) for system, (a, b) in scores.items()}
    notes.append("ties: " + ", ".join(f"{count} by {system}" for system, count in ties.items()))
    title = [f"{benchmark.task}, {benchmark.name}: {len(pairs):,} pairs of {len(items):,} questions"]
    title += [f"{len(voices)} voices"] * bool(voices) + [f"split {benchmark.split}"] * bool(benchmark.split)
    return {"title": ", ".join(title), "notes": notes, "missing": missing, "ties": ties,
            "rows": accuracy_rows(benchmark, pairs, scores, options)}
