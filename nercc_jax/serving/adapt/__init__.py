"""Adaptation next to the scheduler: calibration, surrogates, and the choice of settings.

It takes the scheduler's observations, works on threads of its own, and hands over immutable
results (`core/_setup.py` has their types).
"""
