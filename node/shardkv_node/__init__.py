"""The node program: serves the shards it owns from one storage engine. `shardkv_node.engine` is that engine."""
