"""Published scores of speech language models, with the conventions they were made under: what --published prints.

Percent; `sWUGGY` is the in-vocabulary score where the source has two. A value is verified if it was read in the text or the code
of the source named; the others were quoted from memory or second hand and may be wrong, so check them before you cite them.
Numbers compare only under one convention: split, normalisation and average alone move sBLIMP by 3 points.

    python eval.py --published
"""

COLUMNS = ("sWUGGY all", "sWUGGY", "sBLIMP", "tStoryCloze", "sStoryCloze")
CONVENTIONS = """\
TWIST, COLD, GSLM   mean log-likelihood per unit (not stated for TWIST, believed), dev split, the whole story is scored
Slam                mean log-likelihood, <S> given and the last <S> scored, ties 0.5, every recording counts once
Cuervo & Marxer     mean log-likelihood, <S> given and the last one not scored; sBLIMP macro over 12 types / per recording
StoryCloze          1,871 pairs each: two scores less than 2.3 points apart may be one and the same
                    TWIST-1.3B and 7B stood at 61.3 and 64.4 in tStoryCloze in the first version of the benchmark's README"""

V, U = "", "?"  # verified; not verified
ROWS = (  # model, parameters, (value, mark) in the order of COLUMNS, source
    ("GSLM", "150M", ((64.8, V), (68.7, U), (54.2, V), (66.6, V), (53.3, V)), "as re-run for SpiRit-LM and Slam"),
    ("AudioLM", "150M", ((71.5, V), (83.7, V), (64.7, V), None, None), "Cuervo & Marxer; notes on AudioLM"),
    ("COLD-1.3B", "1.3B", ((72.2, U), (81.9, U), (56.5, V), None, None), "Cuervo & Marxer; TWIST"),
    ("TWIST-350M", "305M", (None, (81.42, U), (56.20, V), None, None), "Slam; TWIST"),
    ("TWIST-1.3B", "1.3B", ((72.7, U), (82.5, U), (57.0, V), (70.6, V), (52.4, V)), "Slam"),
    ("TWIST-7B", "7B", ((73.9, V), (83.6, U), (59.0, V), (74.1, V), (55.3, V)), "Slam; Covo-Audio"),
    ("TWIST-13B", "13B", ((74.5, V), (84.1, V), (59.2, V), (76.4, V), (55.4, V)), "Slam; notes on SpiRit-LM and Sylber"),
    ("Slam, without DPO", "358M", (None, None, (56.45, V), (78.01, V), (55.59, V)), "Slam, table 3"),
    ("Slam", "358M", (None, None, (58.86, V), (82.04, V), (58.04, V)), "Slam, table 3"),
    ("Slam, scaled", "358M", (None, None, (61.11, V), (84.18, V), (61.30, V)), "Slam, table 3"),
    ("cold 85M / 8.5B units", "85M", (None, None, (57.72, V), (70.98, V), (52.75, V)), "Cuervo & Marxer, sBLIMP macro"),
    ("cold 309M / 9.9B units", "309M", (None, None, (59.57, V), (73.49, V), (54.94, V)), "Cuervo & Marxer, sBLIMP macro"),
    ("cold 823M / 82B units", "823M", (None, None, (61.33, V), (77.93, V), (56.92, V)), "Cuervo & Marxer, sBLIMP macro"),
    ("the same", "823M", (None, None, (58.36, V), None, None), "Cuervo & Marxer, sBLIMP per recording"),
    ("SpiRit-LM", "7B", ((69.0, V), None, (58.3, V), (82.9, V), (61.0, V)), "notes on SpiRit-LM"),
    ("Align-SLM-7B", "7B", (None, None, (62.3, V), (86.8, V), (61.1, V)), "Slam"),
    ("LLaMA-7B, text", "7B", (None, None, None, (98.3, V), None), "SpokenStoryCloze's README"),
    ("human", "", (None, None, None, (90.2, V), (79.9, V)), "Cuervo & Marxer, after TWIST"),
)


def table():
    """All of it as text; ? marks what is not verified."""
    lines = [("published (? not verified)", "size", *COLUMNS, "source")]
    for model, size, values, source in ROWS:
        lines.append((model, size, *("" if value is None else f"{value[0]:g}{value[1] or ' '}" for value in values), source))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(f"{cell:<{width}}" if i in (0, len(widths) - 1) else f"{cell:>{width}}"
                      for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
    return "\n".join([*rows, "", CONVENTIONS])
