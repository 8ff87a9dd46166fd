"""`python -m bench`: the command, also from a checkout that is not installed."""

from bench.command.main import main

main(prog_name="bench")
