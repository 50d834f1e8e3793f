"""The experiments: what is compared with what, on which material, with which options of train.py, and what the paper says.

Arms differ in how training starts; cells are levels of the other factors. Rates are tuned for each arm of each cell on seed 0,
over the grid that stands here; the other seeds run at the best. The first contrast is the claim. Material (real.py, text_lms.py,
merged_units.py, pocket/variants.py) is made when a run needs it.
"""
from functools import partial

from experiments import real, text_lms
from experiments.merged_units import merged_units
from experiments.runner import Contrast, Experiment
from experiments.text_lms import text_lm
from pocket.variants import german, other_tokenizer

STARTS = {start: {"init": start} for start in ("twist", "shuffled", "cold")}
POCKET = {"dtype": "bfloat16", "eval_interval": "20"}  # --dtype=float32 where processors emulate it
SMALLER = POCKET | {"dtype": "float32", "lm": "{0.8M}"}  # any processor, a third of the time; TWIST gains as at 3M (`data`)
RATES = {"": ("2e-3", "4e-3")}  # of 1e-3, 2e-3, 4e-3 and 8e-3 the best two of every start after 400 updates, seed 0


def against_others(cells, tasks=()):
    """TWIST before cold and before shuffled, and shuffled before cold, in every cell; then in scores of eval.py."""
    return tuple(contrast for cell in cells for contrast in (
        Contrast((cell, "twist"), (cell, "cold"), share=True), Contrast((cell, "twist"), (cell, "shuffled"), share=True),
        Contrast((cell, "shuffled"), (cell, "cold")),
        *(Contrast((cell, "twist"), (cell, "cold"), task, share=task == "lowest") for task in tasks)))


REAL = {"stories260K": {"lm": "{stories260K}", "steps": "300", "tokens_per_step": "2048", "eval_rows": "0"},
        "SmolLM2-135M": {"lm": "{smollm2}", "steps": "120", "tokens_per_step": "1024", "dtype": "bfloat16"}}  # half the hours
BUDGETS = {"400": {"steps": "400"}, "100": {"steps": "100"}, "400, constant rate": {"steps": "400", "schedule": "constant"},
           "1600": {"steps": "1600", "eval_interval": "80"}}
TASKS = ("swuggy", "sblimp", "sstorycloze", "tstorycloze")
SIZES = {size: {"lm": f"{{{size}}}"} if size != "3M" else {} for size in text_lms.SIZES}  # 3M is the bundle's, taken unasked
FAMILIES, READERS = ({name: {} if name in ("llama", "text4000") else {"lm": f"{{{name}}}"} for name in names}
                     for names in (text_lms.FAMILIES, ("text8000", "text4000", "text1000")))  # those two are 0.8M
SHARES = {f"{share} % of the data, {size}{how}": {"data_fraction": str(share / 100), **SIZES[size], **steps}
          for size in ("0.8M", "3M") for share in (1, 10, 100)
          for how, steps in (("", {}), (", equal epochs", {"steps": str(4 * share)})) if not (how and share == 100)}
MEASURED = ("loss", "lowest", *TASKS[:2])  # the second because a hundredth is learnt by heart, as its first two runs had shown
HEARD = {f"{share} % of the data": {"data_fraction": str(share / 100)} for share in (10, 1, 100)}  # an axis of a map
READ_BY = {f"{start}, {name}": {"init": start, **lm} for name, lm in READERS.items() for start in ("twist", "shuffled")}
CELLS = {f"{rate:g} Hz, {centres}": (rate, centres) for rate in (12.5, 25, 50) for centres in (100, 200, 500, 1000)}
WORDS = {"merged to 500": (500, "215"), "merged to 2000": (2000, "130")}  # vocabulary; updates with the speech of 400 plain ones
UNITS = {name: {"data": f"{{{name}}}/train", "val_data": f"{{{name}}}/val", "eval.data": f"{{{name}}}/benchmarks",
                "eval.train_data": f"{{{name}}}/train"} for name in (*CELLS, *WORDS)}
MERGED = {cell + how: UNITS[cell] | ({"steps": steps} if how else {})
          for how in ("", ", equal speech") for cell, (_, steps) in WORDS.items()}
MATERIAL = {  # {name: function: folder -> path}, each called when a run needs it
    "real": lambda folder: real.real_units(folder)[0].parent, "german": german, "smollm2": real.smollm2,
    "stories260K": lambda folder: real.released("text_lm", "stories260K_hf"),
    "permuted": lambda folder: text_lms.layers_permuted(text_lm(folder), folder / "permuted", seed=0),
    "elsewhere": partial(text_lm, size="3M", text="elsewhere"), "de": partial(text_lm, text="german"),
    "both": partial(text_lm, text="both"), **{f"{size}, 1000": partial(text_lm, size=size, steps=1000) for size in SIZES},
    **{size: partial(text_lm, size=size) for size in SIZES}, **{family: partial(text_lm, family=family) for family in FAMILIES},
    "random": partial(text_lm, order="random"), **{f"text{steps}": partial(text_lm, steps=steps) for steps in (1000, 8000)},
    **{cell: partial(other_tokenizer, rate=rate, centres=centres) for cell, (rate, centres) in CELLS.items()},
    **{cell: partial(merged_units, vocabulary=size) for cell, (size, _) in WORDS.items()}}

EXPERIMENTS = {
    "real": Experiment(
        "Does a text LM that others trained help on units of people's speech (CC BY-NC 4.0), beyond the scale of its weights?",
        "warm starts reach a lower loss than cold ones at every size (figure 2); no scale-matched control",
        STARTS, against_others(REAL), REAL,
        options={"data": "{real}/train", "val_data": "{real}/val", "dtype": "float32", "eval_interval": "20"},
        rates={"stories260K": ("1e-3", "3e-3", "1e-2", "2e-2"), "SmolLM2-135M": ("5e-4", "1.5e-3")},
        seeds={"stories260K": 5, "SmolLM2-135M": 2}, pace=2.0),
    "starts": Experiment(
        "Does a warm start reach a lower loss, and the cold start's in fewer updates, at every budget?",
        "lower loss, and the cold start's perplexity in about a quarter of the updates (figure 2b, OPT-350M)",
        STARTS, against_others(BUDGETS, TASKS), BUDGETS, POCKET, tasks=TASKS,
        rates=RATES | {"100": ("2e-3", "4e-3", "8e-3"), **dict.fromkeys([*BUDGETS][2:], ("1e-3", "2e-3", "4e-3"))}),
    "fair": Experiment(
        "Does it, too, if the text LM read stories of somebody else, and not those that are spoken?",
        "text and speech of the paper are of different sources", STARTS, against_others([""]),
        options={**POCKET, "lm": "{elsewhere}"}, rates=RATES),
    "knowledge": Experiment(
        "Is it what the text LM knows, beyond the scale of its weights, the order of its layers, the letters of the text?",
        "pretraining on images helps less than on text (ImageGPT; not verified)",
        {**STARTS, "layers permuted": {"init": "twist", "lm": "{permuted}"},
         "text in random order": {"init": "twist", "lm": "{random}"}},
        (Contrast(("", "twist"), ("", "shuffled")), Contrast(("", "twist"), ("", "layers permuted")),
         Contrast(("", "twist"), ("", "text in random order"))),
        options=SMALLER, rates={"": ("2e-3", "4e-3", "8e-3")}),  # of two, 0.8M liked the higher
    "data": Experiment(
        "Does a warm start on a tenth of the recordings do as well as a cold one on all?",
        "10 % with TWIST at least as good as 100 % cold (figure 2a)", STARTS,
        tuple(contrast for size in ("3M", "0.8M") for contrast in (
            *(Contrast((f"10 % of the data, {size}", "twist"), (f"100 % of the data, {size}", "cold"), on) for on in MEASURED),
            *against_others([f"{share} % of the data, {size}" for share in (1, 10, 100)], MEASURED[1:]))),
        SHARES, POCKET | {"dtype": "float32"}, rates=RATES, seeds={"": 3}, tasks=TASKS[:2]),
    "tokenizers": Experiment(
        "Do 25 units a second help words more than 50 or 12.5, and more centres than few?",
        "500 units at 25 Hz do best (its table of tokenizers); more centres know more words and have a higher perplexity",
        {start: STARTS[start] for start in ("twist", "cold")},
        (*(Contrast((f"25 Hz, {k}", "twist"), (f"{rate} Hz, {k}", "twist"), "swuggy") for rate in (50, 12.5) for k in (500, 100)),
         Contrast(("25 Hz, 500", "twist"), ("25 Hz, 100", "twist"), "swuggy"),
         Contrast(("25 Hz, 100", "twist"), ("25 Hz, 500", "twist"), "bits_per_second"),
         *(Contrast((cell, "twist"), (cell, "cold")) for cell in CELLS)),
        {cell: UNITS[cell] for cell in CELLS}, SMALLER, rates=RATES, seeds={"": 1, "25 Hz, 100": 3}, tasks=TASKS[:2]),
    "families": Experiment(
        "Does the gain hold for every family of text LMs?", "it holds for OPT, BLOOM and Pythia", STARTS,
        against_others(FAMILIES), FAMILIES, SMALLER, rates=RATES, seeds={"": 3}),
    "sizes": Experiment(
        "Is a larger model better, and does the gain grow with its size?", "bigger is better, up to 13B (abstract)", STARTS,
        (Contrast(("10M", "twist"), ("0.8M", "twist")), *against_others(SIZES)),  # text LMs of 1,000 updates; 4,000: hours at 10M
        {size: {"lm": f"{{{size}, 1000}}"} for size in SIZES}, POCKET | {"dtype": "float32"}, rates=RATES, seeds={"": 3}),
    "cost": Experiment("What does it take to come to the final loss of a cold start?", "a quarter of the updates (figure 2b)"),
    "embedding": Experiment(
        "Does it matter how the new table of units is drawn?", "drawn anew; no comparison is published",
        {kind: {"init": "twist", "embedding": kind} for kind in ("fresh", "matched", "truncate")},
        (Contrast(("", "matched"), ("", "fresh")), Contrast(("", "truncate"), ("", "fresh"))), options=POCKET, rates=RATES),
    "languages": Experiment(
        "Does a text LM of English help German speech, and one of German more?", "left open by the paper",
        {"English text": {"init": "twist"}, "German text": {"init": "twist", "lm": "{de}"},
         "both texts": {"init": "twist", "lm": "{both}"}, "shuffled": {"init": "shuffled"}, "cold": {"init": "cold"}},
        (Contrast(("", "English text"), ("", "cold")), Contrast(("", "English text"), ("", "shuffled")),
         Contrast(("", "German text"), ("", "English text"))),
        options={**SMALLER, "data": "{german}/train", "val_data": "{german}/val"}, rates=RATES),
    "words": Experiment(
        "Do units that are more like words bring speech nearer to text?", "an open question",
        STARTS, (*(Contrast((cell, "twist"), ("plain", "twist"), on) for cell in MERGED for on in ("bits_per_second", "swuggy")),
                 *against_others(["plain", *MERGED])),
        {"plain": {}, **MERGED}, {**SMALLER, "eval.norm": "sum"}, rates=RATES, seeds={"": 3}, tasks=TASKS[:1]),
    "regime": Experiment(
        "Where does it show most what the text LM knows: after longer reading, with less speech?",
        "a quarter of the updates (figure 2b); reading and speech are not varied",
        {**READ_BY, "cold": {"init": "cold"}},
        tuple(Contrast((heard, f"twist, {read}"), (heard, other), share=True)
              for heard in HEARD for read in READERS for other in (f"shuffled, {read}", "cold")),
        HEARD, SMALLER, rates=RATES, seeds={"": 3}),
}
