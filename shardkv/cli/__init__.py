"""The `shardkv` command. main.py finds the commands; each is in a module of its own, loaded when it is called."""
