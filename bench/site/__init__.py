"""The published results as a static site: a table to sort and filter, a page a comparison, and one that shows any run.

From records to pages: `pages`, `run_page` and `shelves` (thousands of runs in few files). Pictures: `charts` and
`matrix` say what is drawn, `drawing` how, `counts` puts counts together. `build` writes, `assets` and `rendering` are
what all pages share.
"""
