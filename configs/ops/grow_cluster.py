"""Bring a running cluster to a number of nodes, and even out what they carry: an example of `shardkv.Admin`.

    python configs/ops/grow_cluster.py --nodes 4
    python configs/ops/grow_cluster.py --nodes 4 --router 10.0.0.5:7400 --rate 50 --dry-run

Nodes are added one after the other, so that each move is made once; with fewer nodes than there are, those that came
last are removed. Everything can be interrupted and run again: jobs go on by themselves, and what is done is done.
Exit code 0 when the cluster is as it was asked for, 3 when a job failed.
"""

from __future__ import annotations

import argparse
import sys

from shardkv import Admin
from shardkv.admin import Job, Plan

MB = 1_000_000


def main() -> int:
    options = parsed()
    with Admin(options.router) as admin:
        active = [node.name for node in admin.nodes() if node.wish == "active"]
        missing = options.nodes - len(active)
        print(f"The cluster has {len(active)} nodes: {', '.join(active)}.")
        if options.dry_run:
            show(admin.plan_add(missing) if missing > 0 else admin.rebalance(dry_run=True))
            return 0
        done = True
        for job in running(admin):
            done = followed(admin, job) and done
        for _ in range(missing):
            added = admin.add_node(rate_bytes_s=options.rate * MB)
            print(f"{added.node} is wanted; waiting until it has joined.")
            admin.wait_joined(added.node, timeout=600)
            done = followed(admin, admin.job(added.job)) and done
        for name in active[options.nodes :]:
            done = followed(admin, admin.remove_node(name, rate_bytes_s=options.rate * MB)) and done
        if admin.rebalance(dry_run=True).moves:
            done = followed(admin, admin.rebalance(rate_bytes_s=options.rate * MB)) and done
        for node in admin.nodes():
            if node.wish == "active":
                print(f"{node.name}: {node.shards} shards, {(node.bytes or 0) / MB:.1f} MB, {node.state}")
    return 0 if done else 3


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bring a cluster to a number of nodes.")
    parser.add_argument("--nodes", type=int, required=True, help="how many there are to be")
    parser.add_argument("--router", default="127.0.0.1:7400", help="HOST:PORT of a router")
    parser.add_argument("--rate", type=int, default=0, help="MB/s for each shard that moves; 0: no limit")
    parser.add_argument("--dry-run", action="store_true", help="only show what would move")
    return parser.parse_args()


def running(admin: Admin) -> list[Job]:
    """What an earlier run of this script, or somebody else, left under way."""
    return [job for job in admin.jobs() if not job.ended]


def followed(admin: Admin, job: Job) -> bool:
    """Tell how a job goes until it has ended. Whether it is done."""
    for seen in admin.watch_job(job.id):
        job = seen
        percent = 100 * job.bytes_done // job.bytes_total if job.bytes_total else 0
        left = f", {job.eta_s:.0f} s left" if job.eta_s and not job.ended else ""
        print(f"job {job.id} ({job.kind}) {job.state}: {percent} %{left} {job.problem}".rstrip())
    return job.state == "done"


def show(plan: Plan) -> None:
    print(f"{len(plan.moves)} shards, {plan.bytes / MB:.1f} MB, about {plan.eta_s:.0f} s:")
    for move in plan.moves:
        print(f"  shard {move.shard} from {move.source} to {move.target}, {move.bytes / MB:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
