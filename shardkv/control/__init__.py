"""What moves, splits and merges shards, decided purely: rules of changes, duties of nodes, jobs, plans. Free of I/O.

The spec, with every persisted step and every rule by name: CHANGES.md beside this file.
"""
