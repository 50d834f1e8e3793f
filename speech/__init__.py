"""Samples and their features: what turns audio into frame units.

audio (files <-> 16 kHz samples) -> hubert (the network) -> kmeans (centres of its features) -> encoder (all of it, exact in
batches and on recordings of any length). The chapter that shows the way is hubert_units.py.
"""
