"""`python -m bench`: the command, also from a checkout that is not installed."""

from bench.cli import main

main(prog_name="bench")
