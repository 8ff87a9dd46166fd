"""Does our implementation of a method learn what its authors' own code learns? `python -m tests.agreement`.

The authors' client training and aggregation run as they were published, on our split, initial weights, cohorts and
batches; `problem` hands these out and tests both ends alike, `foreign` opens a checkout, and `authors/` has a file for
each method: what is called there, and what cannot be equal.
"""
