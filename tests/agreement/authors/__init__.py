"""A file for each method: how its authors' code is called, and what of it cannot be equal to ours."""
