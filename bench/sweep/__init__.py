"""Many runs: in which order, where, told to whom, and what becomes of those that fail.

A *driver* is the process that does a sweep. It skips what is done (`driver`), orders the rest (`schedule`) by what it
is expected to take (`forecast`), and gives it to a *pool*: this process (`pool`) or Ray (`on_ray`). There each run is
executed (`execution`), by its own process or with others (`actors`). What happens is told to watchers (`watch`), one of
which notes it for other shells (`journal`).
"""
