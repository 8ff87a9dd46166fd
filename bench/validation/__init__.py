"""Whether published results hold together, and how they are handed in.

What must stand in a run's folder follows from its identity (`expected`). Each folder is looked at by itself
(`inspection`, and `counted` for its counts and metrics), thousands of them `side_by_side`, then all beside each other
(`report`). What cannot be computed without training is believed until the board runs it again (`rerun`, within a
`tolerance` where bits cannot be compared) or tests models that were handed in (`recount`); both are done and noted by
`board`. `submission` packs finished runs for a pull request, `beside` and `wording` look at what else is handed in.
"""
