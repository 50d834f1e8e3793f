"""The claims of the paper in miniature, each a command, a figure and a verdict: `python -m experiments NAME`."""
