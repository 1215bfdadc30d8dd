"""Pages of several nodes, merged again and again, give every key once and in order."""

from hypothesis import given
from hypothesis import strategies as st

from shardkv.wire.messages import Page
from shardkv_router.merge import frontier_after, merge_pages

ROWS = st.dictionaries(st.binary(min_size=1, max_size=3), st.integers(0, 2), max_size=60)


def node_page(keys: list[bytes], start: bytes, stop: bytes | None, size: int, *, reverse: bool) -> Page:
    """What one node answers that holds `keys` (ascending)."""
    inside = [key for key in keys if key >= start and (stop is None or key < stop)]
    page = (inside[::-1] if reverse else inside)[:size]
    frontier = frontier_after(page[-1], reverse=reverse) if len(page) < len(inside) else None
    return Page(page, [b"v" + key for key in page], frontier, None)


@given(
    ROWS,
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 40),
    st.booleans(),
    st.binary(max_size=2),
    st.binary(max_size=3),
)
def test_pages_cover_everything_once(
    rows: dict[bytes, int], size: int, limit: int, bytes_max: int, reverse: bool, start: bytes, stop: bytes
) -> None:
    bound: bytes | None = stop if stop >= start and stop else None
    nodes = [sorted(key for key, node in rows.items() if node == number) for number in range(3)]
    found: list[bytes] = []
    low, high = start, bound
    while True:
        pages = [node_page(keys, low, high, size, reverse=reverse) for keys in nodes]
        page = merge_pages(pages, reverse=reverse, limit=limit, bytes_max=bytes_max, keys_only=False)
        assert len(page.keys) <= limit
        assert len(page.keys) == 1 or sum(2 * len(key) + 1 for key in page.keys) <= bytes_max
        assert page.values == [b"v" + key for key in page.keys]
        found += page.keys
        if page.frontier is None:
            break
        low, high = (low, page.frontier) if reverse else (page.frontier, high)
    wanted = sorted((key for key in rows if key >= start and (bound is None or key < bound)), reverse=reverse)
    assert found == wanted


def test_rows_past_the_key_all_have_spoken_for_wait_for_the_next_page() -> None:
    quick = Page([b"a", b"z"], [b"1", b"2"], None, None)
    slow = Page([b"b"], [b"3"], b"b\x00", None)
    merged = merge_pages([quick, slow], reverse=False, limit=10, bytes_max=99, keys_only=False)
    assert (merged.keys, merged.values, merged.frontier) == ([b"a", b"b"], [b"1", b"3"], b"b\x00")


def test_keys_only_pages_have_no_values() -> None:
    merged = merge_pages(
        [Page([b"b"], None, None, None), Page([b"a"], None, None, None)],
        reverse=True,
        limit=9,
        bytes_max=99,
        keys_only=True,
    )
    assert (merged.keys, merged.values, merged.frontier) == ([b"b", b"a"], None, None)


def test_of_two_frontiers_the_nearer_one_counts() -> None:
    near = Page([b"a"], [b"1"], b"b", None)
    far = Page([b"b", b"c"], [b"2", b"3"], b"d", None)
    merged = merge_pages([near, far], reverse=False, limit=9, bytes_max=99, keys_only=False)
    assert (merged.keys, merged.frontier) == ([b"a"], b"b")
    near, far = Page([b"z"], [b"1"], b"y", None), Page([b"y", b"x"], [b"2", b"3"], b"x", None)
    merged = merge_pages([near, far], reverse=True, limit=9, bytes_max=99, keys_only=False)
    assert (merged.keys, merged.frontier) == ([b"z", b"y"], b"y")
