"""`python -m quieten`, which is also what torchrun starts."""

from .cli import main

main()
