"""How fast, and how large: `bench speed`."""
