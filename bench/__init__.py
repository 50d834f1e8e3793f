"""Ours beside the peers, in one process: `python -m bench NAME`. Each file says at its head what it measures, and how."""
