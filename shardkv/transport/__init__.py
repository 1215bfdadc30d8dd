"""The thin I/O shell around the wire protocol: a server, and a peer connection that mends itself."""
