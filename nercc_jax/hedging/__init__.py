"""Hedging of any async call: a second one where it helps, within a budget. It needs no JAX."""

from ._hedge import hedge

__all__ = ["hedge"]
