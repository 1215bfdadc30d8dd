"""Runs a whole cluster on one machine: starts its processes, watches them, starts them again, stops them in order."""
