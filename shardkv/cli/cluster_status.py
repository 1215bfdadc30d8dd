"""What `shardkv cluster status` says: processes as their launcher knows them, the cluster as its metadata has it."""

from __future__ import annotations

from typing import Any

from shardkv.cli.steering import plain, size_text, table_text

SERVING = "serving"
WHOLE_TIMEOUT_S = 5.0


def whole(address: str, *, if_reached: bool = False) -> dict[str, Any] | None:
    """`Admin.status` as plain data. `if_reached`: None instead of an error."""
    from shardkv.admin import Admin
    from shardkv.errors import ShardKVError

    with Admin(address, timeout=WHOLE_TIMEOUT_S) as admin:
        try:
            found: dict[str, Any] = plain(admin.status())
        except ShardKVError:
            if if_reached:
                return None
            raise
    return found


def serves(found: dict[str, Any]) -> bool:
    """Whether all that should serve does."""
    nodes = (found["cluster"] or {}).get("nodes", [])
    silent = [node for node in nodes if node["shards"] and node["state"] != SERVING]
    return bool(found.get("state", SERVING) == SERVING and not silent)


def cluster_text(found: dict[str, Any]) -> str:
    parts = [_processes(found)] if "processes" in found else []
    if found["cluster"] is not None:
        parts += [_nodes(found["cluster"]), *_jobs(found["cluster"]), *_advice(found["cluster"])]
    return "\n\n".join(parts)


def _processes(found: dict[str, Any]) -> str:
    launcher = f"process {found['launcher_pid']}" if found["launcher_pid"] else "none"
    if not found["launcher_pid"] and found["state"] != "stopped":
        launcher = "none: nothing is restarted; `shardkv cluster up` takes over again"
    rows = [
        (
            process["name"],
            process["state"],
            str(process["pid"] or "-"),
            process["address"] or "-",
            "" if process["memory_bytes"] is None else f"{process['memory_bytes'] / 1e6:.0f} MB",
            str(process["restarts"]),
        )
        for process in found["processes"]
    ]
    troubled = [p for p in found["processes"] if p["problem"] and p["state"] not in ("serving", "stopped", "ended")]
    lines = [
        f"The cluster is {found['state']}: {found['partition']}, {_shards(found)} shards.",
        f"  address         {found['address']}",
        f"  data directory  {found['data_dir']}",
        f"  launcher        {launcher}",
        "",
        table_text(("process", "state", "pid", "own address", "memory", "restarts"), rows),
        *(f"{process['name']}: {process['problem']} (log: {process['log']})" for process in troubled),
    ]
    return "\n".join(lines)


def _shards(found: dict[str, Any]) -> int:
    """How many the default keyspace has now, or had when the cluster was made."""
    count: int = found["keyspaces"].get("default", {}).get("shards", found["shards"])
    return count


def _nodes(cluster: dict[str, Any]) -> str:
    header = ("node", "host", "state", "wish", "shards", "size", "ops/s", "tablets")
    return table_text(header, [_node(node) for node in cluster["nodes"]])


def _node(node: dict[str, Any]) -> tuple[str, ...]:
    odd = [f"{len(node[name])} {name}" for name in ("fenced", "missing", "kept") if node[name]]
    return (
        node["name"],
        node["host"] or "-",
        node["state"],
        node["wish"],
        str(node["shards"]),
        size_text(node["bytes"]),
        "-" if node["ops_s"] is None else f"{node['ops_s']:,.0f}",
        ", ".join(odd) or "-",
    )


def _jobs(cluster: dict[str, Any]) -> list[str]:
    rows = [
        (
            str(job["id"]),
            job["kind"],
            job["state"],
            f"{len(job['done']) + len(job['skipped'])}/{len(job['moves'])}" if job["moves"] else "-",
            f"{size_text(job['bytes_done'])} of {size_text(job['bytes_total'])}",
            f"{size_text(job['bytes_s'])}/s",
        )
        for job in cluster["jobs"]
    ]
    return [table_text(("job", "kind", "state", "shards", "moved", "rate"), rows)] if rows else []


def _advice(cluster: dict[str, Any]) -> list[str]:
    told = "\n".join(f"  {line}" for line in cluster["advice"])
    return [f"What to do next:\n{told}"] if told else []
