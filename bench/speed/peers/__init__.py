"""The same work done by others: a file for each, run in a process of its own, and who sets them to work.

None of them is a dependency. What each does in a round is what its own documentation shows for federated averaging.
"""
