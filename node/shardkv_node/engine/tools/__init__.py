"""Offline tools: look at, check, salvage and compact a store that no process has open.

Nothing here is loaded by a running store, except `walk_table`, with which the scrub names a damaged block.
"""
