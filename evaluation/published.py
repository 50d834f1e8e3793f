"""Published scores of speech language models, with the conventions they were made under: what --published prints.

Percent; `sWUGGY` is the in-vocabulary score where the source has two. A value is verified if it was read in the text or the code
of the source named; the others were quoted from memory or second hand and may be wrong, so check them before you cite them.
Numbers compare only under one convention: split, normalisation and average alone move sBLIMP by 3 points.

    python eval.py --published
"""

TABLE = """\
published (? not verified)  size  sWUGGY all  sWUGGY  sBLIMP  tStoryCloze  sStoryCloze  source
GSLM                        150M       64.8    68.7?   54.2         66.6         53.3   as re-run for SpiRit-LM and Slam
AudioLM                     150M       71.5    83.7    64.7                             Cuervo & Marxer; notes on AudioLM
COLD-1.3B                   1.3B       72.2?   81.9?   56.5                             Cuervo & Marxer; TWIST
TWIST-350M                  305M              81.42?   56.2                             Slam; TWIST
TWIST-1.3B                  1.3B       72.7?   82.5?     57         70.6         52.4   Slam
TWIST-7B                      7B       73.9    83.6?     59         74.1         55.3   Slam; Covo-Audio
TWIST-13B                    13B       74.5    84.1    59.2         76.4         55.4   Slam; notes on SpiRit-LM and Sylber
Slam, without DPO           358M                      56.45        78.01        55.59   Slam, table 3
Slam                        358M                      58.86        82.04        58.04   Slam, table 3
Slam, scaled                358M                      61.11        84.18         61.3   Slam, table 3
cold 85M / 8.5B units        85M                      57.72        70.98        52.75   Cuervo & Marxer, sBLIMP macro
cold 309M / 9.9B units      309M                      59.57        73.49        54.94   Cuervo & Marxer, sBLIMP macro
cold 823M / 82B units       823M                      61.33        77.93        56.92   Cuervo & Marxer, sBLIMP macro
the same                    823M                      58.36                             Cuervo & Marxer, sBLIMP per recording
SpiRit-LM                     7B         69            58.3         82.9           61   notes on SpiRit-LM
Align-SLM-7B                  7B                       62.3         86.8         61.1   Slam
LLaMA-7B, text                7B                                    98.3                SpokenStoryCloze's README
human                                                               90.2         79.9   Cuervo & Marxer, after TWIST"""

CONVENTIONS = """\
TWIST, COLD, GSLM   mean log-likelihood per unit (not stated for TWIST, believed), dev split, the whole story is scored
Slam                mean log-likelihood, <S> given and the last <S> scored, ties 0.5, every recording counts once
Cuervo & Marxer     mean log-likelihood, <S> given and the last one not scored; sBLIMP macro over 12 types / per recording
StoryCloze          1,871 pairs each: two scores less than 2.3 points apart may be one and the same
                    TWIST-1.3B and 7B stood at 61.3 and 64.4 in tStoryCloze in the first version of the benchmark's README"""


def table():
    """All of it as text; ? marks what is not verified."""
    return f"{TABLE}\n\n{CONVENTIONS}"
