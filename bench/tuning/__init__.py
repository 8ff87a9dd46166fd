"""Tuning on an equal budget: every algorithm gets the same number of trials, on data set aside from training.

A `study` is the search for one algorithm, within a `space`. Its trial 0 is the algorithm as it was asked for; what
trial n tries is a function of the study and of trials 0..n-1 alone: Optuna's sampler, seeded by study and number, is
told those and asked for the next. So trials of one algorithm follow each other (`book`), those of several run side by
side (`search`), and a search that was interrupted, given more trials, or spread over more workers makes the same
choices. Each is trained and scored by `trial`; `choice` makes a preset of the best.
"""
