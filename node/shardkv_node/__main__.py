"""`python -m shardkv_node run ...`: the node program."""

from shardkv_node.command import node

if __name__ == "__main__":
    node(prog_name="shardkv node")
