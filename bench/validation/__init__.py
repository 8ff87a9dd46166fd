"""Whether published results hold together, and how they are handed in.

What must stand in a run's folder follows from its identity (`expected`). Each folder is looked at by itself
(`inspection`, and `counted` for its counts and metrics), thousands of them `side_by_side`, then all beside each other
(`report`). What cannot be computed without training is believed until somebody runs it again (`rerun`), which is noted
beside the results (`verification`). `submission` packs finished runs for a pull request.
"""
