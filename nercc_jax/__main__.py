"""`python -m nercc_jax` is `nercc`."""

from .cli import main

if __name__ == "__main__":
    main()
