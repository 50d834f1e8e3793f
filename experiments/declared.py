"""The experiments: what is compared with what, on which material, with which options of train.py, and what the paper says.

Arms differ in how training starts; cells are levels of the other factors. Rates are tuned for each arm of each cell on seed 0,
over the grid that stands here; the other seeds run at the best. The first contrast is the claim. Material (real.py, text_lms.py,
languages.py, merged_units.py) is made when a run needs it.
"""
from experiments import languages, merged_units, real, text_lms
from experiments.runner import Contrast, Experiment

STARTS = {start: {"init": start} for start in ("twist", "shuffled", "cold")}
POCKET = {"dtype": "bfloat16", "eval_interval": "20"}  # on a processor without its instructions a run takes thrice as long
LM_STEPS = 4000  # updates of a text LM, as many as the pocket's had
RATES, TWO_RATES = {"": ("2e-3", "4e-3", "8e-3")}, {"": ("2e-3", "4e-3")}
MERGED = (500, 2000)  # vocabularies of merged units


def against_others(cells, tasks=()):
    """TWIST before cold and before shuffled, and shuffled before cold, in every cell; then in scores of eval.py."""
    return tuple(contrast for cell in cells for contrast in (
        Contrast((cell, "twist"), (cell, "cold"), share=True), Contrast((cell, "twist"), (cell, "shuffled"), share=True),
        Contrast((cell, "shuffled"), (cell, "cold")), *(Contrast((cell, "twist"), (cell, "cold"), task) for task in tasks)))


def lm(family="llama", size="3M", **other):
    """A function: folder -> one of our text LMs."""
    return lambda folder: text_lms.text_lm(folder, family, size, steps=LM_STEPS, **other)


def merged(vocabulary):
    return lambda folder: merged_units.merged_units(folder, vocabulary)["train"].parent


def permuted(folder):
    return text_lms.layers_permuted("pocket", folder / "pocket_layers_permuted", seed=0)


def second_language(kind):
    return lambda folder: languages.text_lm(folder / "languages", kind, LM_STEPS)


def german(folder):
    counts = {"train": 880, "val": 60}  # spoken stories: eight hours, and half an hour
    return [languages.speech_units(folder / "languages", "de", part, count) for part, count in counts.items()][0].parent


REAL = {"stories260K": {"lm": "{stories260K}", "steps": "300", "tokens_per_step": "2048", "eval_rows": "0"},
        "SmolLM2-135M": {"lm": "{smollm2}", "steps": "120", "tokens_per_step": "1024"}}
BUDGETS = {"100": {"steps": "100"}, "400": {"steps": "400"}, "1600": {"steps": "1600"},
           "1600, constant rate": {"steps": "1600", "schedule": "constant"}}
TASKS = ("swuggy", "sblimp", "sstorycloze", "tstorycloze")
SHARES = {f"{share} % of the data, {size}{how}": {"data_fraction": str(share / 100), "lm": f"{{{size}}}", **steps}
          for size in ("0.8M", "3M") for share in (1, 10, 100)
          for how, steps in (("", {}), (", equal epochs", {"steps": str(4 * share)})) if not (how and share == 100)}
FAMILIES = {family: {"lm": f"{{{family}}}"} for family in text_lms.FAMILIES}
SIZES = {size: {"lm": f"{{{size}}}"} for size in text_lms.SIZES}
WORDS = {"plain": {}, **{f"merged to {size}": {"data": f"{{merged{size}}}/train", "val_data": f"{{merged{size}}}/val"}
                         for size in MERGED}}

EXPERIMENTS = {
    "real": Experiment(
        "Does a text LM that others trained help on units of people's speech (CC BY-NC 4.0), beyond the scale of its weights?",
        "warm starts reach a lower loss than cold ones at every size (figure 2); no scale-matched control",
        STARTS, against_others(REAL), REAL,
        options={"data": "{real}/train", "val_data": "{real}/val", "dtype": "float32", "eval_interval": "20"},
        material={"real": lambda folder: real.real_units(folder)[0].parent, "stories260K": real.stories260k,
                  "smollm2": real.smollm2},
        rates={"stories260K": ("1e-3", "3e-3", "1e-2", "2e-2"), "SmolLM2-135M": ("5e-4", "1.5e-3")},
        seeds={"stories260K": 5, "SmolLM2-135M": 2}, seconds=600),
    "starts": Experiment(
        "Does a warm start reach a lower loss, and the cold start's in fewer updates, at every budget?",
        "lower loss, and the cold start's perplexity in about a quarter of the updates (figure 2b, OPT-350M)",
        STARTS, against_others(BUDGETS, TASKS), BUDGETS, POCKET, rates=RATES, tasks=TASKS),
    "fair": Experiment(
        "Does it, too, if the text LM read stories of somebody else, and not those that are spoken?",
        "text and speech of the paper are of different sources", STARTS, against_others([""]),
        options={**POCKET, "lm": "{elsewhere}"}, material={"elsewhere": lm(text="elsewhere")}, rates=RATES),
    "knowledge": Experiment(
        "Is it what the text LM knows, beyond the scale of its weights, the order of its layers, the letters of the text?",
        "pretraining on images helps less than on text (ImageGPT; not verified)",
        {**STARTS, "layers permuted": {"init": "twist", "lm": "{permuted}"},
         "text in random order": {"init": "twist", "lm": "{random}"}},
        (Contrast(("", "twist"), ("", "shuffled")), Contrast(("", "twist"), ("", "layers permuted")),
         Contrast(("", "twist"), ("", "text in random order"))),
        options=POCKET, material={"permuted": permuted, "random": lm(order="random")}, rates=RATES),
    "data": Experiment(
        "Does a warm start on a tenth of the recordings do as well as a cold one on all?",
        "10 % with TWIST at least as good as 100 % cold (figure 2a)", STARTS,
        tuple(contrast for size in ("3M", "0.8M") for contrast in (
            Contrast((f"10 % of the data, {size}", "twist"), (f"100 % of the data, {size}", "cold")),
            *against_others([f"{share} % of the data, {size}" for share in (1, 10, 100)]))),
        SHARES, POCKET, material={size: lm(size=size) for size in ("0.8M", "3M")}, rates=TWO_RATES, seeds={"": 3}),
    "families": Experiment(
        "Does the gain hold for every family of text LMs?", "it holds for OPT, BLOOM and Pythia", STARTS,
        against_others(FAMILIES), FAMILIES, POCKET, material={family: lm(family) for family in FAMILIES},
        rates=TWO_RATES, seeds={"": 3}),
    "sizes": Experiment(
        "Is a larger model better, and does the gain grow with its size?", "bigger is better, up to 13B (abstract)", STARTS,
        (Contrast(("10M", "twist"), ("0.8M", "twist")), *against_others(SIZES)), SIZES, POCKET,
        material={size: lm(size=size) for size in SIZES}, rates={"": ("1e-3", "2e-3", "4e-3")}, seeds={"": 3}),
    "embedding": Experiment(
        "Does it matter how the new table of units is drawn?", "drawn anew; no comparison is published",
        {kind: {"init": "twist", "embedding": kind} for kind in ("fresh", "matched", "truncate")},
        (Contrast(("", "matched"), ("", "fresh")), Contrast(("", "truncate"), ("", "fresh"))),
        options=POCKET, rates=TWO_RATES),
    "languages": Experiment(
        "Does a text LM of English help German speech, and one of German more?", "left open by the paper",
        {"English text": {"init": "twist", "lm": "{en}"}, "German text": {"init": "twist", "lm": "{de}"},
         "both texts": {"init": "twist", "lm": "{both}"}, "shuffled": {"init": "shuffled", "lm": "{en}"},
         "cold": {"init": "cold", "lm": "{en}"}},
        (Contrast(("", "English text"), ("", "cold")), Contrast(("", "English text"), ("", "shuffled")),
         Contrast(("", "German text"), ("", "English text"))),
        options={**POCKET, "data": "{german}/train", "val_data": "{german}/val"},
        material={"german": german, **{kind: second_language(kind) for kind in languages.LANGUAGES}},
        rates=TWO_RATES),
    "words": Experiment(
        "Do units that are more like words bring speech nearer to text?", "an open question",
        STARTS, (*(Contrast((f"merged to {size}", "twist"), ("plain", "twist"), "bits_per_second") for size in MERGED),
                 *against_others(WORDS)), WORDS, POCKET,
        material={f"merged{size}": merged(size) for size in MERGED}, rates=TWO_RATES, seeds={"": 3}),
}
