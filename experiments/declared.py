"""The experiments: what is compared with what, on which material, with which options of train.py, and what the paper says.

A declaration is data. Arms differ in how training starts; cells are levels of the other factors. Rates are tuned for each arm of
each cell on seed 0, over the grid that stands here; the other seeds run at the best. The first contrast is the claim.
"""
from experiments import real
from experiments.runner import Contrast, Experiment

STARTS = {start: {"init": start} for start in ("twist", "shuffled", "cold")}


def against_others(cells):
    """TWIST before cold and before shuffled, and shuffled before cold, in every cell."""
    return tuple(contrast for cell in cells for contrast in (
        Contrast((cell, "twist"), (cell, "cold"), share=True), Contrast((cell, "twist"), (cell, "shuffled"), share=True),
        Contrast((cell, "shuffled"), (cell, "cold"))))


MATERIAL = {"real": lambda folder: real.real_units(folder)[0].parent,
            "stories260K": real.stories260k, "smollm2": real.smollm2}

REAL = {"stories260K": {"lm": "{stories260K}", "steps": "300", "tokens_per_step": "2048", "eval_rows": "0"},
        "SmolLM2-135M": {"lm": "{smollm2}", "steps": "120", "tokens_per_step": "1024"}}

EXPERIMENTS = {
    "real": Experiment(
        "Does a text LM that others trained help on units of people's speech, beyond the scale of its weights?",
        "warm starts reach a lower loss than cold ones at every size (figure 2); no scale-matched control",
        STARTS, against_others(REAL), REAL, material=MATERIAL,
        options={"data": "{real}/train", "val_data": "{real}/val", "dtype": "float32", "eval_interval": "20"},
        rates={"stories260K": ("1e-3", "3e-3", "1e-2"), "SmolLM2-135M": ("5e-4", "1.5e-3")},
        seeds={"stories260K": 5, "SmolLM2-135M": 2}, small={"steps": "3", "tokens_per_step": "256", "eval_rows": "2"},
        seconds=600),
}
