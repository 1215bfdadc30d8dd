"""Who owns what: documents of the metadata store, tokens, and the read-only view that routes keys. Free of I/O."""
