"""What operators' scripts use: `from shardkv import Admin`. It asks any router, the metadata process answers."""

from shardkv.admin.admin import Added, Admin
from shardkv.control.reports import ChangeReport
from shardkv.control.told import Job, Keyspace, Node, Plan, Settings, Shard, Status
from shardkv.topology.documents import PlannedMove

__all__ = [
    "Added",
    "Admin",
    "ChangeReport",
    "Job",
    "Keyspace",
    "Node",
    "Plan",
    "PlannedMove",
    "Settings",
    "Shard",
    "Status",
]
