"""Load for benchmarks: which keys come next, requests encoded beforehand for us and for redis, and a driver that is
cheap enough to keep either of them busy."""
