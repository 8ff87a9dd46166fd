"""The published results as a static site: a table to sort and filter, a page a comparison, and ones that show any run
and any two rows.

From records to pages: `pages` and `rows`, which all tables are made of; `run_page` and `shelves` (thousands of runs in
few files), `versus` (any two rows), `suite_page`, `methods` and `family_tree`. Pictures: `charts`, `matrix`, `paired`
and `tails` say what is drawn, `drawing` how, `counts` puts counts together; `picture` is for pages elsewhere. `build`
writes, `assets` and `rendering` are what all pages share.
"""
