"""The wire protocol, free of I/O: frames, the hello, requests and replies. PROTOCOL.md is the specification."""
