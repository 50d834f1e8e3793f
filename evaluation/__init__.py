"""What stands behind eval.py, which asks one of three tasks and prints its rows.

pairs (sWUGGY, sBLIMP, StoryCloze, SALMon, your own), perplexity, generation: the tasks, each run(evaluation, ...) -> rows.
They use likelihood (log p of units), accuracy (averages, intervals, tests), sets (archives -> pairs), reports (tables, files);
published.txt holds the numbers of others.
"""
