"""Adaptation of a batcher to its traffic: calibration, surrogates, and the choice of settings.

It takes the batcher's observations, works on a thread of its own, and hands over immutable
results.
"""
