"""Nested-Regression Coded Computing (NeRCC, arXiv 2402.04377) in JAX."""
