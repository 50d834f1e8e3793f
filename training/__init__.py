"""What stands behind train.py: everything that knows a rank, and what a run keeps.

distributed (processes, parts of tensors) and optimizer (AdamW, also on split weights) <- learner (the model that the loop
trains); state (what a later start goes on from), logs (log.csv), memory (what a run will hold).
"""
