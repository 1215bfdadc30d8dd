"""The storage engine of a node: an LSM store that can also be embedded."""
