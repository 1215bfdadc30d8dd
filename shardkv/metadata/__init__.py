"""The metadata store of a cluster: who the cluster is, its keyspaces, shards, nodes and routers, at revisions."""
