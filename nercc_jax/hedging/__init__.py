"""Hedging of any async call: copies of late calls, within a budget. It needs no JAX."""

from ._hedge import hedge

__all__ = ["hedge"]
