"""What the cluster decides by itself, as a pure plan: the topology in, a transaction out.

Invariant: a plan compares every key it makes with "does not exist", so that carrying it out twice changes nothing.
The metadata process carries plans out; this file does no I/O.
"""

from __future__ import annotations

from shardkv.errors import StoreMismatch
from shardkv.topology.documents import (
    CLUSTER_KEY,
    ClusterDocument,
    encode_document,
)
from shardkv.wire.messages import MetaCompare, MetaPut, MetaTxn


def plan_cluster(document: ClusterDocument) -> MetaTxn:
    """The transaction of a cluster's first start."""
    return _creation({CLUSTER_KEY: encode_document(document)})


def _creation(documents: dict[str, bytes]) -> MetaTxn:
    return MetaTxn(
        compares=[MetaCompare(key, 0) for key in documents],
        puts=[MetaPut(key, document) for key, document in documents.items()],
    )


def check_shape(made: ClusterDocument, asked: ClusterDocument) -> None:
    """Raises StoreMismatch when a cluster was made in another shape than is asked for now."""
    if made.nodes_wanted != asked.nodes_wanted:
        raise StoreMismatch(
            f"This cluster was made with {made.nodes_wanted} nodes and {asked.nodes_wanted} are asked for; "
            "that number is only how many the first placing waited for, and is fixed.",
            hint=f"Ask for {made.nodes_wanted}; `shardkv cluster add-node` and `remove-node` change that. "
            "Or use another data directory.",
        )
    made_shape, asked_shape = _shape(made), _shape(asked)
    if made_shape != asked_shape:
        raise StoreMismatch(
            f"This cluster was made with {made_shape} and {asked_shape} is asked for; "
            "partition and shards are fixed when a cluster is made.",
            hint="Leave these options out, or use another data directory.",
        )


def _shape(document: ClusterDocument) -> str:
    cuts = f" split at {', '.join(repr(cut.decode(errors='replace')) for cut in document.split_at)}"
    return f"{document.partition}, {document.shards} shards{cuts if document.split_at else ''}"
