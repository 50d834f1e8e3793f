"""What stands behind train.py: everything that knows a rank, and what a run keeps.

distributed (processes, DDP, FSDP2) -> optimizer (AdamW, also on split weights) -> step (one update, one validation) -> start
(--init's weights, laid out and filled); state (what a later start goes on from), logs (log.csv), memory (what a run will hold).
"""
