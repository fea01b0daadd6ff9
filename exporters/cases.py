"""Inputs to check an export with: the example, and random ones of sizes that the export didn't see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depgraph.capture.keeping import unwritten
from exporters.calls import FlatModel

NamedDims = Mapping[str, Mapping[int, str]]
"""Input name -> dim -> the name of its free size."""

_SEED = 20


@dataclass(frozen=True)
class Case:
    """Inputs, and what PyTorch makes of them; `rounding` is how much further apart rounding may take each output, if anything."""

    label: str
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    rounding: tuple[float, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is checked: the model, the names it has in the file, the examples it was traced with, its free dims."""

    flat: FlatModel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    dims: NamedDims


def unseen_cases(subject: Subject) -> tuple[list[Case], list[str]]:
    """Cases at other sizes of the free dims, and the names of those that PyTorch itself takes at no other size.

    One case with larger sizes (each name by its own step, else all by the same, else doubled) and one with smaller
    sizes (batch 1); what neither changed is changed alone. A size named as a sum of others ("past + new") is their sum.
    Inputs are random; where the model refuses random ones, the example's values are repeated.
    """
    sizes = example_sizes(subject)
    larger = (
        {name: size + 1 + place for place, (name, size) in enumerate(sizes.items())},
        {name: size + 2 for name, size in sizes.items()},
        {name: size * 2 for name, size in sizes.items()},
    )
    smaller = ({name: 1 if name == "batch" else max(1, size // 2) for name, size in sizes.items()},)
    found = [_first_accepted(subject, sizes, family) for family in (larger, smaller)]
    for name in sorted(_untouched(sizes, found)):
        alone = [{**sizes, name: size} for size in (sizes[name] + 1, sizes[name] * 2, max(1, sizes[name] // 2))]
        found.append(_first_accepted(subject, sizes, alone))
    return [case for _, case in filter(None, found)], sorted(_untouched(sizes, found))


Found = tuple[dict[str, int], Case] | None


def _untouched(sizes: dict[str, int], found: Sequence[Found]) -> set[str]:
    """The names whose size no accepted case changes."""
    return {name for name, size in sizes.items() if all(tried[name] == size for tried, _ in filter(None, found))}


def inseparable(subject: Subject) -> dict[str, str]:
    """Names of text lengths that the trace took for free, but the model only accepts equal to "sequence": -> that."""
    sizes = example_sizes(subject)
    length = sizes.get("sequence", 0)
    apart = [name for name in sizes if name.endswith("_sequence") and sizes[name] == length]
    shorter = {name: {n: s - (n in ("sequence", *apart) and n != name) for n, s in sizes.items()} for name in apart}
    return {name: "sequence" for name in apart if _first_accepted(subject, sizes, [shorter[name]]) is None}


def example_sizes(subject: Subject) -> dict[str, int]:
    """The examples' sizes, by the names of the free dims."""
    return sizes_of(subject, subject.examples)


def sizes_of(subject: Subject, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The sizes of such inputs, by the names of the free dims."""
    return {
        name: tensor.shape[dim]
        for owner, tensor in zip(subject.inputs, inputs, strict=True)
        for dim, name in subject.dims.get(owner, {}).items()
    }


def added_up(sizes: Mapping[str, int]) -> dict[str, int]:
    """The same sizes, where one whose name is a sum of other names ("past + new") is their sum."""
    parts = {name: name.split(" + ") for name in sizes}
    sums = {name: those for name, those in parts.items() if len(those) > 1 and all(part in sizes for part in those)}
    return {**sizes, **{name: sum(sizes[part] for part in those) for name, those in sums.items()}}


def sized_case(subject: Subject, sizes: dict[str, int]) -> Case | None:
    """A case of these sizes, None where PyTorch doesn't take them."""
    found = _first_accepted(subject, {}, [sizes])
    return found[1] if found else None


def _first_accepted(subject: Subject, usual: dict[str, int], family: Sequence[dict[str, int]]) -> Found:
    for sizes in map(added_up, family):
        for fill in (_random_like, _tiled):
            case = _case(subject, sizes, fill) if sizes != usual else None
            if case is not None:
                return sizes, case
    return None


def _case(subject: Subject, sizes: dict[str, int], fill: Any) -> Case | None:
    generator = torch.Generator().manual_seed(_SEED)
    inputs = []
    for name, example in zip(subject.inputs, subject.examples, strict=True):
        shape = list(example.shape)
        for dim, size_name in subject.dims.get(name, {}).items():
            shape[dim] = sizes[size_name]
        inputs.append(fill(example, shape, name, generator))
    label = ", ".join(f"{name}={size}" for name, size in sizes.items())
    try:
        return Case(label, tuple(inputs), _run_torch(subject.flat, inputs))
    except Exception:
        return None


def example_case(flat: FlatModel, inputs: Sequence[Tensor]) -> Case:
    """The example itself."""
    return Case("the example", tuple(inputs), _run_torch(flat, inputs))


def other_values(subject: Subject) -> list[Case]:
    """A case of the example's sizes with random values, where PyTorch takes them."""
    case = _case(subject, example_sizes(subject), _random_like)
    return [] if case is None else [Case("other values", case.inputs, case.expected)]


def _run_torch(flat: FlatModel, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with unwritten(flat) as written:
        return tuple(written.own(t).detach().cpu() for t in flat(*(t.clone() for t in inputs)))


def _random_like(example: Tensor, shape: list[int], name: str, generator: torch.Generator) -> Tensor:
    """Random values of the example's dtype and range; 0/1 masks become left-aligned masks with a full first row."""
    if example.numel() == 0 or example.is_complex():
        return _tiled(example, shape)
    if example.is_floating_point():
        if "mask" in name or not torch.isfinite(example).all():
            return _tiled(example, shape)
        spread, centre = example.double().std(correction=0).item() or 1.0, example.double().mean().item()
        values: Tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + centre
        return values.to(example)
    if example.dtype == torch.bool or ("mask" in name and set(example.unique().tolist()) <= {0, 1}):
        return _left_aligned(shape, generator).to(example)
    low, high = min(0, int(example.min())), int(example.max())
    return torch.randint(low, high + 1, shape, generator=generator).to(example)


def _left_aligned(shape: list[int], generator: torch.Generator) -> Tensor:
    if not shape:
        return torch.ones(())
    lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
    lengths.view(-1)[:1] = shape[-1]
    return torch.arange(shape[-1]) < lengths


def _tiled(example: Tensor, shape: list[int], *_: Any) -> Tensor:
    """The example's values, repeated and cut to `shape`; zeros where it has none."""
    if not example.numel():
        return example.new_zeros(shape)
    tiled = example
    for dim, size in enumerate(shape):
        if size != example.shape[dim]:
            tiled = tiled.index_select(dim, torch.arange(size, device=example.device) % example.shape[dim])
    return tiled


def describe_cases(cases: Sequence[Case], names: Sequence[str]) -> tuple[str, ...]:
    """For the report: each case's label and the shapes of its inputs."""
    return tuple(_shapes(case, names) for case in cases)


def _shapes(case: Case, names: Sequence[str]) -> str:
    pairs: Iterator[tuple[str, Tensor]] = zip(names, case.inputs, strict=True)
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in pairs)
