"""Making up for what went without training: the consumers' remaining weights and biases take over what they can.

The channels P of a consumer go, K stay. Its bias takes the mean of what went (FLAP, METHODS.md 2.2): b += W_P mean(x_P).
Least squares takes more (2.13): what stays predicts what went, W_K += W_P C_PK C_KK^-1, with C the covariance of the channels
where a bias takes the means, and X'X where none can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from depgraph.cutting.slicing import sliced_tensor
from depgraph.errors import ScoreError
from depgraph.plan import Plan
from importance.accumulators import Gram, Moments, Statistic
from importance.choices import pick
from importance.collector import Gathering
from importance.columns import Block, as_weight, blocks_of
from importance.gains import Few, Matrix, Spread
from importance.holding import Held, held_by
from importance.problems import singular
from importance.readers import Reader, readers_of, unseen
from importance.statistics import Statistics, collect

BIASES = {
    "create": "a linear map or convolution of torch without a bias gets one",
    "existing": "only biases that are there take anything over",
    "none": "biases stay as they are",
}


INPUTS = {
    "dense": "those that a consumer has in the dense model",
    "pruned": "those that it has once all before it is pruned and made up for",
}


@dataclass(frozen=True)
class Change:
    """What a consumer's matrix [outputs, columns] and its bias [outputs] become (None: as it was)."""

    weight: Tensor | None
    bias: Tensor | None


def _means(block: Block, gone: Tensor, sums: Any, damping: float) -> Change:
    return Change(None, block.matrix[:, gone] @ sums.mean.to(block.matrix)[gone])


def _least_squares(block: Block, gone: Tensor, sums: Any, damping: float) -> Change:
    return _solved(block, gone, sums, sums.total / max(sums.rows, 1), damping)


def _least_squares_alone(block: Block, gone: Tensor, sums: Any, damping: float) -> Change:
    return _solved(block, gone, sums, torch.zeros_like(sums.total), damping)


def _solved(block: Block, gone: Tensor, sums: Any, centre: Tensor, damping: float) -> Change:
    stays, mean = torch.ones(len(centre), dtype=torch.bool), sums.total / max(sums.rows, 1)
    stays[gone] = False
    kept = torch.nonzero(stays).flatten()
    if not len(kept):
        return Change(None, block.matrix[:, gone] @ mean[gone])
    gain = sums.spread(centre).gain(kept, gone, damping)
    weight = block.matrix.clone()
    weight[:, kept] += block.matrix[:, gone] @ gain.T
    return Change(weight, block.matrix[:, gone] @ (mean[gone] - gain.T @ mean[kept]))


@dataclass(frozen=True)
class _Way:
    """What a kind of compensation needs, what it does where a bias takes the means, and what where none does."""

    needs: Statistic
    with_bias: Callable[[Block, Tensor, Any, float], Change]
    without: Callable[[Block, Tensor, Any, float], Change] | None


WAYS: dict[str, _Way] = {
    "bias": _Way(Moments("columns"), _means, None),
    "least-squares": _Way(Gram(), _least_squares, _least_squares_alone),
}


@dataclass(frozen=True)
class Compensation:
    """kind: "bias" or "least-squares"; biases: what may take over means, see `BIASES`; damping: a share of the mean variance.

    inputs: "dense" solves each consumer for the inputs that it has in the dense model, "pruned" (least squares, in recipes) one
    after the other for those that it has then, see `importance.refitting`; of several dampings each then takes the one that
    fits best the rows it isn't fitted to, see `importance.ridge`. rows: gives, for a plan, what else is added to
    parameters by name (before they are cut), such as `importance.RowUpdate`; with dense inputs only.
    """

    kind: str = "least-squares"
    biases: str = "create"
    damping: float | tuple[float, ...] = 0.01
    inputs: str = "dense"
    rows: Callable[[Plan], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        pick(WAYS, self.kind, "kind of compensation")
        pick(BIASES, self.biases, "use of biases")
        pick(INPUTS, self.inputs, "kind of inputs")
        if not self.dampings or not all(0 <= one < float("inf") for one in self.dampings):
            raise ScoreError(f"damping must be a finite number of at least 0, or several, it is {self.damping}")
        if len(self.dampings) > 1 and self.inputs != "pruned":
            raise ScoreError(f'damping={self.damping}: several to choose from go with inputs="pruned" only, give one')
        if self.rows is not None and self.inputs != "dense":
            raise ScoreError(
                f'rows={self.rows!r} goes with inputs="dense": what is solved for other inputs has no use for it'
            )

    @property
    def dampings(self) -> tuple[float, ...]:
        """Those to choose from."""
        return self.damping if isinstance(self.damping, tuple) else (self.damping,)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that `importance.collect` must gather for it, of the dense model."""
        return (WAYS[self.kind].needs,)


@dataclass(frozen=True)
class Compensated:
    """Which parameters took something over, which biases were made, and why others took nothing."""

    changed: tuple[str, ...]
    created: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        made = f", {len(self.created)} of them new biases" if self.created else ""
        left = f"; {len(self.left)} stay as they were, the first since {self.left[0]}" if self.left else ""
        return f"{len(self.changed)} parameters make up for what went{made}{left}"

    @classmethod
    def joined(cls, parts: Iterable[Compensated]) -> Compensated:
        """What happened in one after the other."""
        rows = [(part.changed, part.created, part.left) for part in parts]
        return cls(*(tuple(dict.fromkeys(n for names in column for n in names)) for column in zip(*rows, strict=True)))


def compensate(
    model: Any,
    plan: Plan,
    data: Iterable[Any] | Statistics,
    how: Compensation | None = None,
    gathering: Gathering | None = None,
) -> Compensated:
    """Change the weights of `model`, which `plan.apply()` gave, so that its consumers put out what they did before.

    Statistics are those of the dense model. Each consumer is solved by itself, for the inputs that it had there. Weights that
    are read elsewhere too (a tied embedding) stay as they are.

    Raises:
        DataError, ScoreError: as `importance.collect` does; a ScoreError also where X'X is singular and damping 0.
    """
    how, gathering = how or Compensation(), gathering or Gathering()
    if not isinstance(data, Statistics):
        data = collect(plan.graph, data, how.needs, gathering)
    held = held_by(model, plan)
    done = made_up(held, plan, data, how)
    held.note(done.created)
    return replace(done, left=(*done.left, *unseen(plan)))


def made_up(held: Held, plan: Plan, data: Statistics, how: Compensation) -> Compensated:
    """Change what `held` has of the consumers with statistics; raises ScoreError as `compensate` does, before anything is changed."""
    changed, created, refused = [], [], []
    work = []
    for reader in readers_of(data, plan):
        if held.here(reader.consumer.weight) is None:
            continue
        if reader.refused:
            refused.append(reader.refused)
            continue
        target = bias_of(held, reader, how)
        if how.kind == "bias" and target is None:
            refused.append(f"{reader.consumer.weight}: no bias of its own can take over means")
            continue
        work.append((reader, target, change_of(reader, how, data, bias=target is not None)))
    rows = _Rows(plan, how)
    for reader, target, change in work:  # nothing is written before all is solved
        changed += _write(held, reader, rows.added(reader, change.weight))
        if target is not None and change.bias is not None:
            stays = reader.outputs_kept
            left = change.bias if stays is None else change.bias[torch.from_numpy(stays)]
            created += write_bias(held, reader, target, left)
            changed.append(target)
    changed += rows.write(held)
    return Compensated(tuple(dict.fromkeys(changed)), tuple(created), tuple(refused))


def change_of(reader: Reader, how: Compensation, found: Statistics, *, bias: bool) -> Change:
    """What a consumer's whole weight becomes, before it is cut, and what is added to its bias."""
    way = WAYS[how.kind]
    solve = way.with_bias if bias and (reader.gives_all or way.without is None) else way.without
    assert solve is not None
    weight = found.graph.tensor(reader.consumer.weight).detach()
    blocks, biases, narrow = [], [], False
    for block in blocks_of(reader.consumer, weight, reader.columns):
        inside = reader.gone[(reader.gone >= block.start) & (reader.gone < block.stop)] - block.start
        sums = found.of(reader.consumer, way.needs)
        wide = Block(block.matrix.double().cpu(), block.start)
        try:
            change = solve(wide, torch.from_numpy(inside), _part(sums, block), how.dampings[0])
        except torch.linalg.LinAlgError as error:
            raise singular(reader.consumer, reader.columns - len(reader.gone)) from error
        narrow = narrow or change.weight is not None
        blocks.append(Block(wide.matrix if change.weight is None else change.weight, block.start))
        biases.append(change.bias)
    whole = as_weight(reader.consumer, blocks, weight.double().cpu()) if narrow else None
    return Change(whole, reader.over_taps(torch.cat([b for b in biases if b is not None])) if bias else None)


@dataclass(frozen=True)
class _Sums:
    """The part of some sums that belongs to one matrix: float64, on the CPU; of second moments, the rows where these are few."""

    rows: int
    mean: Tensor
    gram: Tensor
    few: Tensor | None
    total: Tensor

    def spread(self, mean: Tensor) -> Spread:
        """The second moments about a point [columns]."""
        rows = max(self.rows, 1)
        if self.few is not None:
            return Few((self.few - mean) / rows**0.5)
        return Matrix(self.gram / rows - torch.outer(mean, mean))


def _part(sums: Any, block: Block) -> _Sums:
    at = slice(block.start, block.stop)
    none = torch.zeros(0, dtype=torch.float64)
    mean = sums.mean[at].double().cpu() if hasattr(sums, "mean") else none
    total = sums.total[at].double().cpu() if hasattr(sums, "total") else none
    few = sums.few(block.start, block.stop) if hasattr(sums, "few") else None
    square = few is None and hasattr(sums, "between")
    gram = sums.between(block.start, block.stop).double().cpu() if square else none
    few = None if few is None else few.double().cpu()
    return _Sums(getattr(sums, "rows", getattr(sums, "count", 0)), mean, gram, few, total)


def bias_of(held: Held, reader: Reader, how: Compensation) -> str | None:
    """The bias that may take over means: the consumer's own, or one that it can be given; None for none."""
    if how.biases == "none" or not reader.takes_bias:
        return None
    return reader.bias or (held.new_bias(reader) if how.biases == "create" else None)


class _Rows:
    """What is added to parameters beside what consumers make up for."""

    def __init__(self, plan: Plan, how: Compensation) -> None:
        self.kept, self.tensors = plan.kept(), plan.graph.tensors()
        self.left = dict(how.rows(plan)) if how.rows is not None else {}
        values = plan.graph.capture.program.values.values()
        self.values = {v.target: v for v in values if v.kind == "parameter"} if self.left else {}

    def added(self, reader: Reader, weight: Tensor | None) -> Tensor | None:
        """The whole weight of a consumer with what is added to it, once."""
        more = self.left.pop(reader.consumer.weight, None)
        if more is None:
            return weight
        return more + (reader.tensor.detach().double().cpu() if weight is None else weight)

    def write(self, held: Held) -> list[str]:
        """Add to what is left; the names of these."""
        for name, more in self.left.items():
            dense = self.tensors[name].detach().double().cpu()
            now, fits = held.get(name), sliced_tensor(dense, self.kept, self.values[name])
            change = sliced_tensor(more, self.kept, self.values[name])
            scale = row_scale(now.double().cpu(), fits) if now.ndim > 1 else 1.0
            held.put(name, now + (change * scale).to(now))
        return list(self.left)


def _write(held: Held, reader: Reader, weight: Tensor | None) -> list[str]:
    """Put a whole weight, cut as the plan says, into the pruned model; what a cut has scaled its rows by stays."""
    if weight is None:
        return []
    name, value = reader.consumer.weight, reader.value
    now = held.get(name).double().cpu()
    dense = sliced_tensor(reader.tensor.detach().double().cpu(), reader.kept, value)
    fresh = sliced_tensor(weight, reader.kept, value)
    if now.shape != dense.shape:
        raise ScoreError(
            f"{name!r} has shape {list(now.shape)}, the plan leaves {list(dense.shape)}: give plan.apply()'s model"
        )
    held.put(name, now + (fresh - dense) * row_scale(now, dense))
    return [name]


def row_scale(now: Tensor, dense: Tensor) -> Tensor | float:
    """By what each row of a weight was multiplied when it was cut."""
    if torch.equal(now, dense):
        return 1.0
    rest = list(range(1, now.ndim))
    size = dense.square().sum(dim=rest, keepdim=True)
    return torch.where(size > 0, (now * dense).sum(dim=rest, keepdim=True) / size.clamp(min=1e-300), 1.0)


def write_bias(held: Held, reader: Reader, name: str, change: Tensor) -> list[str]:
    """Add to a bias of the pruned model, [outputs that stay], or make it; the names of those that were made."""
    if reader.bias:
        here = held.get(name)
        held.put(name, here + change.to(here))
        return []
    held.add_bias(reader, name, change)
    return [name]


__all__ = [
    "BIASES",
    "WAYS",
    "Compensated",
    "Compensation",
    "bias_of",
    "change_of",
    "compensate",
    "made_up",
    "row_scale",
    "write_bias",
]
