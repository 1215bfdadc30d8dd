"""Worlds to test in: a real cluster with a handle on every process, and what can go wrong around it."""
