"""Derived columns: what a bin means, that it depends on its own row alone, and that no program can run away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from programs import additive, codes, forest, joint, nearest, scored, sizes

from cohortium.common import derived as module
from cohortium.common.derived import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_WORK,
    Additive,
    AnyDerived,
    Joint,
    Nearest,
    Scored,
    Trees,
    derived_from_wire,
)
from cohortium.common.errors import ProtocolError

PROGRAMS: dict[str, Callable[[], AnyDerived]] = {
    "joint": joint,
    "scored": scored,
    "scored by": lambda: scored(by=joint()),
    "trees": lambda: Scored(score=forest(), edges=np.array([-0.5, 0.0, 0.7])),
    "nearest": nearest,
}


# ---- what the numbers mean ----------------------------------------------------------------------------------


def test_a_joint_column_is_a_mixed_radix_number() -> None:
    rows = codes(50)
    made = joint()
    by_hand = [made.maps[0][r[2]] * 4 + made.maps[1][r[1]] for r in rows]
    assert made.bins == 20 and np.array_equal(made.assign(rows), by_hand)
    four = Joint(columns=(0, 1, 2, 3), maps=tuple(np.arange(s, dtype=np.int32) for s in sizes()), sizes=sizes())
    assert np.array_equal(four.assign(rows), np.ravel_multi_index(tuple(rows.T), sizes()))


def test_an_additive_score_is_the_sum_of_its_tables_in_order() -> None:
    rows, made = codes(50), additive()
    for row, found in zip(rows, made.score(rows), strict=True):
        by_hand = made.intercept
        for column, table in zip(made.columns, made.tables, strict=True):
            by_hand += table[row[column]]
        assert found == by_hand  # the very bits


def walk(trees: Trees, row: np.ndarray) -> float:
    """The definition, one row and one node at a time."""
    total = trees.base
    for root in trees.roots:
        at = int(root)
        while trees.feature[at] >= 0:
            place = int(trees.feature[at])
            ordinal = trees.maps[place][row[trees.columns[place]]]
            at = int(trees.left[at] if ordinal <= trees.threshold[at] else trees.right[at])
        total += trees.value[at]
    return float(total)


@pytest.mark.parametrize("seed", range(5))
def test_trees_give_each_row_the_sum_of_its_leaves(seed: int) -> None:
    rows, trees = codes(60, seed=seed), forest(seed=seed, trees=7, depth=1 + seed)
    assert np.array_equal(trees.score(rows), [walk(trees, row) for row in rows])


def test_trees_of_different_depths_and_single_leaves() -> None:
    """A root that is a leaf; a chain; a leaf shared by two parents."""
    trees = Trees(
        columns=(2,),
        maps=(np.arange(sizes()[2], dtype=np.int32),),
        feature=np.array([-1, 0, 0, -1, -1], np.int32),
        threshold=np.array([0, 50, 20, 0, 0], np.int32),
        left=np.array([0, 2, 3, 0, 0], np.int32),
        right=np.array([0, 3, 4, 0, 0], np.int32),
        value=np.array([0.25, 0, 0, 1.0, -1.0]),
        roots=np.array([0, 1], np.int32),
        base=10.0,
    )
    assert trees.depths == (0, 2)
    age = np.zeros((4, 4), np.int32)
    age[:, 2] = [20, 21, 50, 51]
    assert list(trees.score(age)) == [11.25, 9.25, 9.25, 11.25]


def test_a_score_on_an_edge_falls_into_the_bin_above() -> None:
    table = np.linspace(0, 1, sizes()[2])
    made = Scored(score=Additive(columns=(2,), tables=(table,)), edges=np.array([table[30], table[60]]))
    age = np.zeros((5, 4), np.int32)
    age[:, 2] = [0, 29, 30, 59, 60]
    assert list(made.assign(age)) == [0, 0, 1, 1, 2] and made.bins == 3


def test_a_score_is_cut_within_the_bins_of_another_column() -> None:
    rows, by = codes(80), joint()
    made, plain = scored(by=by), scored()
    assert made.bins == by.bins * plain.bins
    assert np.array_equal(made.assign(rows), by.assign(rows) * plain.bins + plain.assign(rows))


def test_the_distance_to_the_nearest_row_is_that_of_a_double_loop() -> None:
    rows, made = codes(40), nearest(rows=25)
    for row, found in zip(rows, made.distance(rows), strict=True):
        far = []
        for theirs in made.rows:
            total = 0.0
            for place, column in enumerate(made.columns):
                gap = abs(int(made.maps[place][row[column]]) - int(theirs[place]))
                total += gap / (made.sizes[place] - 1) if made.ordinal[place] else float(gap > 0)
            far.append(total)
        assert found == pytest.approx(min(far) / len(made.columns), abs=1e-15)
    assert made.distance(rows).min() >= 0 and made.distance(rows).max() <= 1
    same = nearest(rows=1)
    own = np.zeros((1, 4), np.int32)
    own[0] = [np.flatnonzero(m == b)[0] for m, b in zip(same.maps, same.rows[0], strict=True)]
    assert same.distance(own)[0] == 0


def test_a_column_of_one_bin_has_no_distance() -> None:
    flat = np.zeros(sizes()[2], np.int32)
    made = Nearest(
        columns=(2,), maps=(flat,), ordinal=(True,), sizes=(1,), rows=np.zeros((3, 1), np.int32), edges=np.array([0.5])
    )
    assert not made.distance(codes(5)).any()


# ---- what makes them safe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_row_has_its_bin_wherever_it_stands(name: str) -> None:
    """Alone, among others, in another order, across a chunk's border: the very same bits."""
    program, rows = PROGRAMS[name](), codes(3000, seed=4)
    whole = program.assign(rows)
    assert whole.dtype == np.int64 and whole.min() >= 0 and whole.max() < program.bins
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(program.assign(rows[order]), whole[order])
    assert all(program.assign(rows[i : i + 1])[0] == whole[i] for i in range(0, 3000, 60))
    assert program.assign(rows[:0]).shape == (0,)


@pytest.mark.parametrize("score", [additive, forest], ids=["additive", "trees"])
def test_scores_are_the_same_bits_across_chunks(score: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = score(), codes(500)
    whole = made.score(rows)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert whole.tobytes() == made.score(rows).tobytes()
    assert whole.tobytes() == np.concatenate([made.score(rows[i : i + 1]) for i in range(500)]).tobytes()


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_code_of_the_dictionary_gets_a_bin(name: str) -> None:
    """Missing ones too: once a program fits the dictionary, no record can make it fail."""
    program = PROGRAMS[name]()
    program.check_codes(sizes())
    grid = np.stack(np.meshgrid(*[[0, s // 2, s - 1] for s in sizes()]), axis=-1).reshape(-1, 4).astype(np.int32)
    bins = program.assign(grid)
    assert bins.min() >= 0 and bins.max() < program.bins


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_does_not_fit_the_dictionary_is_refused(name: str) -> None:
    program = PROGRAMS[name]()
    for wrong in ((), sizes()[:1], tuple(s + 1 for s in sizes()), tuple(s - 1 for s in sizes())):
        with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
            program.check_codes(wrong)


def test_each_part_of_a_program_is_held_against_the_dictionary() -> None:
    """A score that fits does not carry a `by` that does not, nor the other way round."""
    short = Joint(columns=(1,), maps=(np.zeros(sizes()[1] - 1, np.int32),), sizes=(1,))
    score = Additive(columns=(0,), tables=(np.zeros(sizes()[0] + 1),))
    for wrong in (
        Scored(score=additive(), edges=np.array([0.0]), by=short),
        Scored(score=score, edges=np.array([0.0]), by=joint()),
    ):
        with pytest.raises(ProtocolError, match="QUERY-SHAPE"):
            wrong.check_codes(sizes())


# ---- the wire -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_wire_form_comes_back_as_it_went(name: str) -> None:
    program, rows = PROGRAMS[name](), codes(200)
    fields, blobs = program.to_wire()
    again = derived_from_wire(fields, blobs)
    assert type(again) is type(program) and again.to_wire() == (fields, blobs)
    assert np.array_equal(again.assign(rows), program.assign(rows))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wire_form_with_a_piece_missing_or_swapped_is_refused(name: str) -> None:
    """Every field and every blob: absent, of another type, cut by one byte, doubled."""
    fields, blobs = PROGRAMS[name]().to_wire()
    said = (ProtocolError, KeyError, TypeError, ValueError, AttributeError, OverflowError)
    for key in fields:
        with pytest.raises(said):
            derived_from_wire(
                {k: v for k, v in fields.items() if k != key} | ({"kind": "?"} if key == "kind" else {}), blobs
            )
        for bad in ("x", 3, [], [1.5], [-1], [[0]], {"kind": "joint"}):
            if fields[key] != bad:
                with pytest.raises(said):
                    derived_from_wire({**fields, key: bad}, blobs)
    for key, blob in blobs.items():
        with pytest.raises(said):
            derived_from_wire(fields, {k: v for k, v in blobs.items() if k != key})
        with pytest.raises(said):
            derived_from_wire(fields, {**blobs, key: blob[:-1]})
    for bad in (None, [], "joint", {"kind": ["joint"]}, {"kind": "pickle"}):
        with pytest.raises(ProtocolError, match="QUERY-KIND"):
            derived_from_wire(bad, blobs)


# ---- hostile programs ---------------------------------------------------------------------------------------


def nodes(**changes: Any) -> Trees:
    """One tree of two leaves over the age."""
    given: dict[str, Any] = {
        "columns": (2,),
        "maps": (np.arange(sizes()[2], dtype=np.int32),),
        "feature": [0, -1, -1],
        "threshold": [3, 0, 0],
        "left": [1, 0, 0],
        "right": [2, 0, 0],
        "value": [0.0, 1.0, 2.0],
        "roots": [0],
    } | changes
    for name in ("feature", "threshold", "left", "right", "roots"):
        given[name] = np.array(given[name], np.int32)
    return Trees(**{**given, "value": np.array(given["value"], np.float64)})


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("SHAPE: a node that is its own child", {"left": [0, 0, 0]}),
        ("SHAPE: a child before its parent", {"feature": [0, 0, -1], "left": [1, 0, 0], "right": [2, 2, 0]}),
        ("SHAPE: a child beyond the nodes", {"right": [3, 0, 0]}),
        ("SHAPE: a child of minus one", {"left": [-1, 0, 0]}),
        ("SHAPE: a root beyond the nodes", {"roots": [3]}),
        ("SHAPE: a root of minus one", {"roots": [-1]}),
        ("SHAPE: no root", {"roots": []}),
        ("SHAPE: no node", {"feature": [], "threshold": [], "left": [], "right": [], "value": []}),
        ("SHAPE: a column that is not there", {"feature": [1, -1, -1]}),
        ("SHAPE: minus two", {"feature": [-2, -1, -1]}),
        ("SHAPE: lists of two lengths", {"threshold": [3, 0]}),
        ("VALUE: NaN at a leaf", {"value": [0.0, np.nan, 0.0]}),
        ("VALUE: inf at an inner node", {"value": [np.inf, 1.0, 0.0]}),
        ("VALUE: a leaf whose sums overflow", {"value": [0.0, 1e300, 0.0]}),
        ("VALUE: NaN as base", {"base": float("nan")}),
        ("SHAPE: the same column twice", {"columns": (2, 2), "maps": (np.arange(101, dtype=np.int32),) * 2}),
        ("SHAPE: a map below zero", {"maps": (np.full(101, -1, np.int32),)}),
        ("SHAPE: a map of floats", {"maps": (np.zeros(101),)}),
        (
            "SIZE: too many nodes",
            {
                n: [-1 if n == "feature" else 0] * (MAX_NODES + 1)
                for n in ("feature", "threshold", "left", "right", "value")
            },
        ),
        ("SIZE: too many trees", {"roots": [0] * 5000}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_trees_that_would_run_away_or_astray_are_refused(why: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="QUERY-" + why.split(":")[0]):
        nodes(**changes)


def chain(depth: int) -> dict[str, list[float]]:
    """A tree whose left child is always the next node."""
    inner = list(range(depth))
    return {
        "feature": [0] * depth + [-1],
        "threshold": [1] * (depth + 1),
        "left": [i + 1 for i in inner] + [0],
        "right": [depth] * depth + [0],
        "value": [0.0] * depth + [1.0],
    }


def test_a_tree_may_be_so_deep_and_no_deeper() -> None:
    assert nodes(**chain(MAX_DEPTH)).depths == (MAX_DEPTH,)
    began = time.process_time()
    for depth in (MAX_DEPTH + 1, 3 * MAX_DEPTH, 200_000):
        with pytest.raises(ProtocolError, match="QUERY-SIZE"):
            nodes(**chain(depth))
    assert time.process_time() - began < 5


def test_many_deep_trees_take_too_long_and_are_refused() -> None:
    allowed = MAX_WORK // 16 // (MAX_DEPTH + 1) - 1
    assert nodes(**chain(MAX_DEPTH), roots=[0] * allowed).work <= MAX_WORK
    with pytest.raises(ProtocolError, match="QUERY-SIZE"):
        nodes(**chain(MAX_DEPTH), roots=[0] * (allowed + 2))


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("SHAPE", lambda: Joint(columns=(), maps=(), sizes=())),
        ("SHAPE", lambda: Joint(columns=(0, 0), maps=(np.zeros(3, np.int32),) * 2, sizes=(1, 1))),
        ("SHAPE", lambda: Joint(columns=(-1,), maps=(np.zeros(3, np.int32),), sizes=(1,))),
        ("SHAPE", lambda: Joint(columns=(0,), maps=(np.array([0, 1, 2], np.int32),), sizes=(2,))),
        ("SHAPE", lambda: Joint(columns=(0,), maps=(np.array([0, -1, 1], np.int32),), sizes=(2,))),
        ("SHAPE", lambda: Joint(columns=(0,), maps=(np.zeros(0, np.int32),), sizes=(2,))),
        ("SHAPE", lambda: Joint(columns=(0,), maps=(np.zeros(3, np.int32),), sizes=(0,))),
        ("SHAPE", lambda: Joint(columns=(0,), maps=(np.zeros(3, np.int64),), sizes=(1,))),
        ("SHAPE", lambda: Joint(columns=tuple(range(5)), maps=(np.zeros(3, np.int32),) * 5, sizes=(1,) * 5)),
        ("SIZE", lambda: Joint(columns=(0, 1), maps=(np.zeros(3, np.int32),) * 2, sizes=(1 << 11, 1 << 11))),
        ("SIZE", lambda: Joint(columns=(0, 1), maps=(np.zeros(3, np.int32),) * 2, sizes=(10**30, 10**30))),
        ("VALUE", lambda: Additive(columns=(0,), tables=(np.array([0.0, np.nan, 1.0]),))),
        ("VALUE", lambda: Additive(columns=(0,), tables=(np.array([0.0, -np.inf, 1.0]),))),
        ("VALUE", lambda: Additive(columns=(0,), tables=(np.array([1e308, 1e308]),))),
        ("VALUE", lambda: Additive(columns=(0,), tables=(np.zeros(3),), intercept=float("inf"))),
        ("SHAPE", lambda: Additive(columns=(), tables=())),
        ("SHAPE", lambda: Additive(columns=(0,), tables=(np.zeros((3, 1)),))),
        ("SHAPE", lambda: Additive(columns=(0,), tables=(np.array([object()] * 3),))),
        ("VALUE", lambda: Scored(score=additive(), edges=np.array([0.0, np.nan]))),
        ("VALUE", lambda: Scored(score=additive(), edges=np.array([0.0, np.inf]))),
        ("VALUE", lambda: Scored(score=additive(), edges=np.array([1.0, 0.0]))),
        ("VALUE", lambda: Scored(score=additive(), edges=np.array([1.0, 1.0]))),
        ("SIZE", lambda: Scored(score=additive(), edges=np.arange(1e6), by=joint())),
        ("SHAPE", lambda: nearest(rows=0)),
        ("SIZE", lambda: nearest(rows=MAX_WORK // 4 + 1, sizes=(1, 1, 1, 1))),
        ("SHAPE", lambda: nearest(digit=5)),
        ("SHAPE", lambda: nearest(digit=-1)),
        ("SIZE", lambda: nearest(rows=2500, sizes=(4000, 3, 3, 3))),
        ("VALUE", lambda: nearest(edges=np.array([0.5, 0.1]))),
    ],
)
def test_a_program_that_makes_no_sense_is_refused(code: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ProtocolError, match=f"QUERY-{code}"):
        make()


def test_the_largest_distance_a_site_computes_is_bounded_in_time_and_memory() -> None:
    """A million numbers a row: about a millisecond each on one core, tables of at most 64 MB."""
    import tracemalloc

    p, m, rng = 4, MAX_WORK // 4, np.random.default_rng(0)
    width = min(8, module.MAX_DISTANCES // m // p)
    made = Nearest(
        columns=tuple(range(p)),
        maps=tuple((np.arange(s) % width).astype(np.int32) for s in sizes()),
        ordinal=(True,) * p,
        sizes=(width,) * p,
        rows=rng.integers(0, width, (m, p)).astype(np.int32),
        edges=np.array([0.1]),
    )
    assert made.work <= MAX_WORK + 16 * 10
    tracemalloc.start()
    began = time.process_time()
    made.assign(codes(50))
    assert time.process_time() - began < 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
