"""`python -m pretrain` is the command line."""

from pretrain.cli import main

main()
