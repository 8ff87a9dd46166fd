"""The published results as a static site: a table to sort and filter, and a page for every run."""
