"""Seeds are the same everywhere and differ from part to part."""

from __future__ import annotations

from midstream.flows.seeds import derive


def test_a_seed_is_the_same_in_every_process() -> None:
    assert [derive(0), derive(0, 0), derive(7, "draw", 3)] == [
        7520536977032167579,
        6168997292806018030,
        4851459669150999231,
    ]


def test_parts_have_seeds_of_their_own_that_a_request_takes() -> None:
    paths: list[tuple[int | str, ...]] = [(), (0,), (1,), ("0",), (0, 1), (1, 0), ("a", "b"), ("a/b",), ("a,b",)]
    paths += [(k,) for k in range(2, 1000)]
    seeds = {derive(seed, *path) for seed in range(3) for path in paths}
    assert len(seeds) == 3 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
