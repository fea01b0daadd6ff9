"""Labels flow: axes of small hand-made relations."""

from __future__ import annotations

import numpy as np
import pytest

from depgraph import coupling
from depgraph.classes import NONE, Classes
from depgraph.coupling import find_axes
from depgraph.graph import Program, Reason


def groups(program: Program, *seeds: int) -> list[dict[int, list[int]]]:
    """For each axis, the groups of every seed dim it reaches, renumbered from 0."""
    classes = Classes.of(program)
    numbers = [int(classes.of_dim[s]) for s in seeds]
    found = []
    for labelling in find_axes(classes, numbers, set(numbers)):
        known: dict[int, int] = {NONE: NONE}
        reached = {}
        for seed, number in zip(seeds, numbers, strict=True):
            if number in labelling.labels:
                raw = labelling.groups(number).tolist()
                reached[seed] = [known.setdefault(g, len(known) - 1) for g in raw]
        found.append(reached)
    return found


def dims(program: Program, *sizes: int) -> list[int]:
    return [program.relations.new_dim(size) for size in sizes]


def test_aligned_dims_are_one_axis() -> None:
    program = Program()
    a, b = dims(program, 4, 4)
    program.relations.align(a, b)
    assert groups(program, a, b) == [{a: [0, 1, 2, 3], b: [0, 1, 2, 3]}]


def test_a_concatenation_keeps_its_parts_apart() -> None:
    program = Program()
    whole, left, right = dims(program, 5, 2, 3)
    program.relations.align_at(left, np.arange(2), whole, np.arange(2))
    program.relations.align_at(right, np.arange(3), whole, np.arange(2, 5))
    assert groups(program, whole) == [{whole: [0, 1, -1, -1, -1]}, {whole: [-1, -1, 0, 1, 2]}]


def test_heads_and_the_dims_within_them_are_two_axes() -> None:
    program = Program()
    rows, heads, width = dims(program, 6, 2, 3)
    program.relations.fold(rows, [heads, width])
    assert groups(program, rows) == [{rows: [0, 0, 0, 1, 1, 1]}, {rows: [0, 1, 2, 0, 1, 2]}]


def test_grouped_queries() -> None:
    program = Program()
    queries, keys, kv, ratio, width = dims(program, 12, 4, 2, 3, 2)
    program.relations.refold([queries], [kv, ratio, width])
    program.relations.refold([keys], [kv, width])
    found = groups(program, queries, keys)
    assert {queries: [0] * 6 + [1] * 6, keys: [0, 0, 1, 1]} in found
    assert {queries: [0, 0, 1, 1, 2, 2] * 2} in found
    assert {queries: [0, 1] * 6, keys: [0, 1] * 2} in found
    assert len(found) == 3


def test_rotary_halves_go_in_pairs() -> None:
    program = Program()
    (width,) = dims(program, 6)
    program.relations.align_at(width, np.arange(3), width, np.arange(3, 6))
    assert groups(program, width) == [{width: [0, 1, 2, 0, 1, 2]}]


def test_a_fixed_index_fixes_its_group_with_the_reason() -> None:
    program = Program()
    a, b = dims(program, 4, 2)
    program.relations.align_at(b, np.arange(2), a, np.array([1, 3]))
    program.relations.fix(b, Reason("because"), np.array([1]))
    classes = Classes.of(program)
    seeds = [int(classes.of_dim[a])]
    reasons = [r for found in find_axes(classes, seeds, set(seeds)) for r in found.reasons.values()]
    assert [str(r) for r in reasons] == ["because"]


def test_a_dim_that_meets_itself_everywhere_is_no_axis() -> None:
    program = Program()
    (a,) = dims(program, 4)
    program.relations.align_at(a, np.arange(3), a, np.arange(1, 4))
    assert groups(program, a) == []


def test_runs_that_cross_share_factors() -> None:
    program = Program()
    a, b, c, d = dims(program, 6, 4, 3, 8)
    program.relations.refold([a, b], [c, d])
    assert len(groups(program, a, b, c, d)) == 3


def test_a_dense_chain_is_linear_in_its_edges() -> None:
    """Each layer sees all earlier ones: what an axis fills is counted, not timed."""

    def filled(layers: int) -> int:
        program = Program()
        parts = dims(program, *[4] * layers)
        for k in range(2, layers + 1):
            (whole,) = dims(program, 4 * k)
            for j, part in enumerate(parts[:k]):
                program.relations.align_at(part, np.arange(4), whole, np.arange(4 * j, 4 * j + 4))
        classes = Classes.of(program)
        seeds = [int(classes.of_dim[p]) for p in parts]
        return sum(len(found.labels) for found in find_axes(classes, seeds, set(seeds)))

    edges = [layers * (layers + 1) / 2 for layers in (8, 16, 32)]
    ratios = [filled(layers) / e for layers, e in zip((8, 16, 32), edges, strict=True)]
    assert max(ratios) <= 2


def test_what_is_said_twice_is_said_once() -> None:
    program = Program()
    a, b = dims(program, 4, 6)
    for _ in range(3):
        program.relations.align_at(a, np.arange(4), b, np.arange(1, 5))
    classes = Classes.of(program)
    assert len(classes.pushes[int(classes.of_dim[a])]) == 1
    assert groups(program, a, b)[0] == {a: [0, 1, 2, 3], b: [-1, 0, 1, 2, 3, -1]}


def test_an_index_that_stands_for_several_joins_them() -> None:
    """Gathering rows 0, 1, 1, 0 of `a`: each of its indices goes with two of `b`."""
    program = Program()
    a, b = dims(program, 2, 4)
    program.relations.align_at(a, np.array([0, 1, 1, 0]), b, np.arange(4))
    assert groups(program, a, b) == [{a: [0, 1], b: [0, 1, 1, 0]}]


def test_slices_that_overlap_share_the_groups_that_both_see() -> None:
    program = Program()
    whole, left, right = dims(program, 6, 4, 4)
    program.relations.align_at(left, np.arange(4), whole, np.arange(4))
    program.relations.align_at(right, np.arange(4), whole, np.arange(2, 6))
    first, rest = groups(program, whole, left, right)
    assert first == {whole: [0, 1, 2, 3, -1, -1], left: [0, 1, 2, 3], right: [2, 3, -1, -1]}
    assert rest == {whole: [-1, -1, -1, -1, 0, 1], right: [-1, -1, 0, 1]}


def test_the_channels_of_a_grouped_convolution() -> None:
    """Whole blocks go, and positions within the blocks of the input and of the output on their own."""
    program = Program()
    inputs, outputs, blocks, inner, outer = dims(program, 6, 10, 2, 3, 5)
    program.relations.fold(inputs, [blocks, inner])
    program.relations.fold(outputs, [blocks, outer])
    found = groups(program, inputs, outputs)
    assert len(found) == 3
    assert {inputs: [0, 0, 0, 1, 1, 1], outputs: [0] * 5 + [1] * 5} in found
    assert {inputs: [0, 1, 2] * 2} in found
    assert {outputs: [0, 1, 2, 3, 4] * 2} in found


def test_folds_within_folds() -> None:
    program = Program()
    rows, half, a, b, c = dims(program, 12, 6, 2, 2, 3)
    program.relations.fold(rows, [a, half])
    program.relations.fold(half, [b, c])
    found = groups(program, rows)
    assert sorted(max(f[rows]) + 1 for f in found) == [2, 2, 3]
    assert {rows: [0] * 6 + [1] * 6} in found
    assert {rows: [0, 0, 0, 1, 1, 1] * 2} in found
    assert {rows: [0, 1, 2] * 4} in found


def test_rotary_halves_within_heads() -> None:
    """The halves of each head turn together: pairs, alike in all heads; the heads stay an axis of their own."""
    program = Program()
    rows, heads, width, table = dims(program, 12, 3, 4, 2)
    program.relations.fold(rows, [heads, width])
    program.relations.align_at(width, np.arange(2), table, np.arange(2))
    program.relations.align_at(width, np.arange(2, 4), table, np.arange(2))
    found = groups(program, rows, table)
    assert {rows: [0, 1, 0, 1] * 3, table: [0, 1]} in found
    assert {rows: [0] * 4 + [1] * 4 + [2] * 4} in found
    assert len(found) == 2


def test_dims_of_different_sizes_cannot_be_aligned_and_size_one_broadcasts() -> None:
    program = Program()
    a, b, one = dims(program, 4, 5, 1)
    program.relations.align(a, one)
    with pytest.raises(ValueError, match="sizes 4 and 5"):
        program.relations.align(a, b)
    assert groups(program, a, b) == [{a: [0, 1, 2, 3]}, {b: [0, 1, 2, 3, 4]}]


def test_reasons_reach_only_the_groups_that_touch_what_is_fixed() -> None:
    program = Program()
    rows, heads, width = dims(program, 6, 2, 3)
    program.relations.fold(rows, [heads, width])
    program.relations.fix(width, Reason("the first of each head"), np.array([0]))
    classes = Classes.of(program)
    seeds = [int(classes.of_dim[rows])]
    blocks, within = sorted(find_axes(classes, seeds, set(seeds)), key=lambda f: len(set(f.groups(seeds[0]).tolist())))
    assert not blocks.reasons
    assert list(map(str, within.reasons.values())) == ["the first of each head"]


def test_a_lifted_reason_no_longer_counts() -> None:
    program = Program()
    (a,) = dims(program, 3)
    program.relations.fix(a, Reason("an output's width", lift="output 0"))
    assert int(Classes.of(program).of_dim[a]) in Classes.of(program).fixed_whole
    assert not Classes.of(program, frozenset({"output 0"})).fixed_whole


@pytest.mark.parametrize("nested", [False, True])
def test_each_class_is_filled_a_bounded_number_of_times(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense chain, with every concatenation made of all parts or of the one before it: fills are counted, not timed."""
    fills = 0
    fill = coupling._Flow._fill

    def counting(self: coupling._Flow, number: int, new: np.ndarray) -> None:
        nonlocal fills
        fills += 1
        fill(self, number, new)

    monkeypatch.setattr(coupling._Flow, "_fill", counting)
    each = []
    for layers in (8, 16, 32):
        program = Program()
        parts = dims(program, *[4] * layers)
        before = [parts[0]]
        for k in range(2, layers + 1):
            (whole,) = dims(program, 4 * k)
            pieces = [*before, parts[k - 1]] if nested else parts[:k]
            start = 0
            for piece in pieces:
                size = program.relations.sizes[piece]
                program.relations.align_at(piece, np.arange(size), whole, np.arange(start, start + size))
                start += size
            before = [whole]
        classes = Classes.of(program)
        fills = 0
        seeds = [int(classes.of_dim[p]) for p in parts]
        found = find_axes(classes, seeds, set(seeds))
        assert len(found) == layers
        each.append(fills / sum(len(f.labels) for f in found))
    assert max(each) <= 4
    assert each[-1] <= 1.2 * each[0]


@pytest.mark.parametrize("order", [1, -1])
def test_a_chain_of_views_has_as_many_classes_as_foldings(order: int) -> None:
    """A width is split into heads of 2, 4 and 8 by turns, and joined again each time; classes are counted, not timed."""

    def classes(views: int) -> int:
        program = Program()
        (flat,) = dims(program, 64)
        for k in range(views):
            heads = 2 ** (1 + k % 3)
            joined, *parts = dims(program, 64, heads, 64 // heads)
            program.relations.refold([flat], parts)
            program.relations.refold(parts, [joined])
            flat = joined
        program.relations.folds[:] = program.relations.folds[::order]
        return len(Classes.of(program).size)

    assert classes(6) == classes(60) == 1 + 3 * 2


def test_dims_split_alike_are_split_into_the_same_heads() -> None:
    program = Program()
    left, right, heads, width, more_heads, more_width = dims(program, 12, 12, 3, 4, 3, 4)
    program.relations.fold(left, [heads, width])
    program.relations.fold(right, [more_heads, more_width])
    assert groups(program, heads)[0] == {heads: [0, 1, 2]}
    apart = Classes.of(program).of_dim
    assert apart[heads] != apart[more_heads]
    program.relations.align(left, right)
    together = Classes.of(program).of_dim
    assert together[heads] == together[more_heads]
    assert together[width] == together[more_width]


def test_a_part_that_cannot_go_is_not_merged_so_that_its_reason_is_found() -> None:
    program = Program()
    flat, heads, width, counted, beside = dims(program, 12, 3, 4, 3, 4)
    program.relations.fold(flat, [heads, width])
    program.relations.fold(flat, [counted, beside])
    program.relations.fix(counted, Reason("it is counted"))
    classes = Classes.of(program)
    numbers = [int(classes.of_dim[d]) for d in (flat, heads)]
    reasons = [{str(r) for r in found.reasons.values()} for found in find_axes(classes, numbers, set(numbers))]
    assert {"it is counted"} in reasons
    assert set() in reasons


def test_shuffled_units_cost_as_much_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half passes by, half is made anew, both are shuffled: fills of labels are counted, not timed."""
    fills = 0
    fill = coupling._Flow._fill

    def counting(self: coupling._Flow, number: int, new: np.ndarray) -> None:
        nonlocal fills
        fills += 1
        fill(self, number, new)

    monkeypatch.setattr(coupling._Flow, "_fill", counting)
    each = []
    for units in (16, 32, 64):
        program = Program()
        (x,) = dims(program, 16)
        seeds = [x]
        for _ in range(units):
            left, right, made, joined, shuffled, two, pairs = dims(program, 8, 8, 8, 16, 16, 2, 8)
            relations = program.relations
            for half, whole, start in ((left, x, 0), (right, x, 8), (left, joined, 0), (made, joined, 8)):
                relations.align_at(half, np.arange(8), whole, np.arange(start, start + 8))
            relations.refold([joined], [two, pairs])
            relations.refold([pairs, two], [shuffled])
            seeds += [right, made]
            x = shuffled
        classes = Classes.of(program)
        fills = 0
        numbers = [int(classes.of_dim[s]) for s in seeds]
        assert find_axes(classes, numbers, set(numbers))
        each.append(fills / units)
    assert each[-1] <= 1.2 * each[0]
