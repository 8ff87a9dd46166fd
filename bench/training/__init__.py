"""One run: clients, engines, rounds, tests."""
