"""The node's part in what `shardkv.control` decides: which shards it serves, and how they move, split and merge.

    housekeeping   carries out the duties of every newer topology view: tablets made, adopted, dropped, served
    source         the owner of a shard that moves: pins, files, tail, fence
    target         the node that fetches it, and commits
    making         the owner of a shard that is split, or of two that are merged
    fences         promises on disk to answer nothing for a shard
    settling       transactions of the metadata store whose outcome must be known
    reporting      what the controller and people are told of it

The rules are in shardkv/control/CHANGES.md; nothing here decides one anew.
"""
