"""The paper's claims in miniature, one command each: `python -m experiments NAME`. Each file says at its head what it makes."""
