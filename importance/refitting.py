"""Fitting a pruned model's consumers to the dense model, one after the other, each on what the ones before it put out now.

The dense and the pruned model run side by side, an operator at a time. Before a consumer runs, its weights are solved anew so
that it puts out what the dense one does, from the inputs that it really has:
min ||W x + b - V z - c||^2 over V, c, with x the dense inputs and z the pruned ones, V held near W's own columns by damping.
So errors don't add up from layer to layer, as they do where each is solved for dense inputs (SparseGPT's sequential inputs,
METHODS.md 2.13, with the dense outputs for a target).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from depgraph.capture.capturing import quiet
from depgraph.consumers import Meeting
from depgraph.errors import ScoreError
from depgraph.observing import Met
from depgraph.plan import Plan
from importance.calling import calls_of, check_batches, samples_in
from importance.collector import Gathering
from importance.columns import blocks_of
from importance.compensation import Compensated, Compensation, bias_of, made_up, row_scale, write_bias
from importance.consumers import Key, consumers_of
from importance.holding import Held, held_by
from importance.laid_out import Samples
from importance.patches import patches
from importance.picked import of_picked_rows
from importance.problems import singular
from importance.readers import Reader, readers_among, unseen
from importance.ridge import Fit, Parted
from importance.statistics import collect


def refit(model: Any, plan: Plan, batches: Iterable[Any], how: Compensation | None = None) -> Compensated:
    """Solve the weights of `model`, which `plan.apply()` gave, anew so that each consumer puts out what the dense one does.

    All that reads through a parameter of its own (linear maps, convolutions without groups) is solved, also what lost no
    channels: its inputs have changed. What else lost channels (convolutions with groups, weights that are used several times) is
    solved for its dense inputs first, as `compensate` does. Activations of all batches are held at the place where both models
    stand.

    Raises:
        DataError: there are no batches, or one doesn't fit the model.
        ScoreError: the pruned model computes in another order than the dense one, or an input isn't finite.
        Weights are as they were then.
    """
    check_batches(batches)
    how, batches = how or Compensation(), list(batches)
    held = held_by(model, plan)
    try:
        others = _others(held, plan, batches, how)
        work = _Work(model, plan, how, held)
        with quiet(plan.graph.model), quiet(model):
            for step in work.steps(batches):
                work.solve(step)
    except BaseException:
        held.put_back()
        raise
    done = Compensated.joined([others, Compensated(tuple(work.changed), tuple(work.created), tuple(work.left))])
    held.note(done.created)
    return replace(done, left=(*done.left, *unseen(plan)))


def _others(held: Held, plan: Plan, batches: list[Any], how: Compensation) -> Compensated:
    """Solve what lost channels and can't be fitted to the inputs that it has in the pruned model for those it had."""
    consumers = [r.consumer for r, why in _readers(plan) if why and not r.refused and len(r.gone)]
    if not consumers or how.kind != "least-squares":
        return Compensated((), (), ())
    axes = frozenset(axis for consumer in consumers for axis in consumer.labels)
    found = collect(plan.graph, batches, how.needs, Gathering(axes=axes))
    here = {c.key: found.found[c.key] for c in consumers if c.key in found.found}
    return made_up(held, plan, replace(found, found=here), replace(how, inputs="dense", damping=how.dampings[0]))


def _readers(plan: Plan) -> list[tuple[Reader, str]]:
    """All that reads through a parameter, and why that can't be fitted to inputs of the pruned model; empty where it can."""
    readers = list(readers_among(consumers_of(plan.graph), plan))
    picked = of_picked_rows(plan.graph, [reader.consumer for reader in readers])
    return [(r, r.refused or _refusal(r, r.consumer in picked)) for r in readers]


@dataclass(frozen=True)
class _Step:
    """A consumer before which both models stand, with the sums over all batches."""

    reader: Reader
    sums: Parted


class _Work:
    """Both models, the consumers that may be solved, and what was done to them."""

    def __init__(self, model: Any, plan: Plan, how: Compensation, held: Held) -> None:
        self.model, self.plan, self.how, self.held = model, plan, how, held
        self.changed: list[str] = []
        self.created: list[str] = []
        self.left: list[str] = []
        self.readers: dict[Key, Reader] = {}
        self.biases: dict[Key, str] = {}
        fits = _readers(plan)
        self.names = {held.here(reader.consumer.weight): reader.consumer.weight for reader, _ in fits}
        for reader, why in fits:
            if held.here(reader.consumer.weight) is None:  # gone with a block
                continue
            if why:
                self.left += [why] if reader.refused else []
                continue
            self.readers[reader.consumer.key] = reader
            target = bias_of(held, reader, how)
            if target is not None:  # before the pruned model is traced, which must see it
                self.created += [] if reader.bias else write_bias(held, reader, target, torch.zeros(reader.outputs))
                self.biases[reader.consumer.key] = target
        self.pruned = plan.graph.again(model)
        theirs = {self._key(m) for m in self.pruned.observer().pausable}
        for key in [key for key in self.readers if key not in theirs]:
            self.left.append(f"{self.readers.pop(key).consumer.weight}: the pruned model has no such weight")

    def _key(self, meeting: Meeting) -> Key:
        """The key in the dense model of a meeting in the pruned one."""
        name, place = meeting.key
        return self.names.get(name, name), place

    def steps(self, batches: list[Any]) -> Iterator[_Step]:
        """Stop both models, on all batches, before each consumer in turn."""
        dense, pruned = self.plan.graph.observer(), self.pruned.observer()
        calls = list(calls_of(self.plan.graph, batches, "to fit with"))
        samples = [samples_in(self.plan.graph, args, kwargs) for args, kwargs in calls]

        def wanted(meeting: Meeting) -> bool:
            return meeting.key in self.readers

        def wanted_there(meeting: Meeting) -> bool:
            return self._key(meeting) in self.readers

        runs = [(dense.steps(call, wanted), pruned.steps(call, wanted_there)) for call in calls]
        for _ in self.readers:
            stands = [(next(a, None), next(b, None)) for a, b in runs]
            yield _Step(*self._sums(stands, samples))

    def _sums(self, stands: list[tuple[Met | None, Met | None]], samples: list[Samples]) -> tuple[Reader, Parted]:
        keys = {a.meeting.key if a else None for a, _ in stands} | {
            self._key(b.meeting) if b else None for _, b in stands
        }
        key = next(iter(keys))
        if len(keys) != 1 or key is None:
            raise ScoreError(
                f"{self.plan.graph.name} computes in another order once it is pruned, or than on another batch, so that its "
                "weights can't be fitted one after the other: use compensate"
            )
        pairs = ((_rows(a, s), _rows(b, s)) for (a, b), s in zip(stands, samples, strict=True) if a and b)
        parted = Parted.of(pairs, parted=len(self.how.dampings) > 1)
        sums = parted.all
        if not bool(torch.isfinite(sums.zz).all() and torch.isfinite(sums.xz).all()):
            raise ScoreError(f"NaN or infinity comes in at {self.readers[key].consumer}: look at the weights before it")
        return self.readers[key], parted

    def solve(self, step: _Step) -> None:
        """Give one consumer the weights, and the bias, that fit best."""
        reader, sums = step.reader, step.sums.all
        parameter = self.held.get(reader.consumer.weight)
        target = self.biases.get(reader.consumer.key)
        (dense,) = blocks_of(reader.consumer, reader.tensor.detach().double().cpu(), reader.columns)
        now = _matrix(reader, parameter.double().cpu())
        wanted = reader.rows_kept(dense.matrix)
        wanted = wanted * _scale(now, wanted, reader)
        fit = Fit(wanted, now, centred=target is not None and reader.gives_all)
        try:
            fresh = fit.solved(sums, fit.damping(step.sums, self.how.dampings))
        except torch.linalg.LinAlgError as error:
            raise singular(reader.consumer, now.shape[1]) from error
        self.held.put(reader.consumer.weight, _shaped(reader, fresh, parameter))
        self.changed.append(reader.consumer.weight)
        if target:
            bias = self.held.get(target)
            self.held.put(target, bias + reader.over_taps((wanted @ sums.x - fresh @ sums.z) / sums.rows).to(bias))
            self.changed.append(target)


def _refusal(reader: Reader, picked: bool) -> str:
    """Why a consumer can't be solved; empty where it can."""
    name, dense = reader.consumer.weight, reader.tensor
    if picked:
        return f"{name}: what comes into it is picked by what other weights say"
    if len(reader.consumer.meetings) > 1:
        return f"{name}: it is used several times"
    if reader.consumer.size != dense.shape[reader.consumer.weight_dim] or reader.consumer.groups > 1:
        return f"{name}: its convolution has groups"
    if dense.ndim > 2 and dense[0, 0].numel() not in (reader.window, len(reader.taps)):
        return f"{name}: it is no matrix"
    return ""


def _rows(met: Met, samples: Samples) -> Tensor:
    windows = None if met.meeting.second else patches(met.node, met.operand)
    if windows is not None:
        return samples.rows(windows, 1, torch.float32).flat
    return samples.rows(met.operand, met.meeting.dim, torch.float32, places=met.operand_from).flat


def _matrix(reader: Reader, weight: Tensor) -> Tensor:
    """A pruned weight as [outputs, columns]."""
    if reader.window > 1:
        return weight.flatten(1)
    return weight.movedim(reader.consumer.weight_dim, -1).flatten(0, -2)


def _shaped(reader: Reader, matrix: Tensor, like: Tensor) -> Tensor:
    if reader.window > 1:
        return matrix.reshape(like.shape).to(like)
    at = reader.consumer.weight_dim
    return matrix.reshape(like.movedim(at, -1).shape).movedim(-1, at).to(like)


def _scale(now: Tensor, dense: Tensor, reader: Reader) -> Tensor | float:
    """By what each row was multiplied when it was cut (a scale that the module's Python computes from a size)."""
    stays = torch.ones(dense.shape[1], dtype=torch.bool)
    stays[torch.from_numpy(reader.gone)] = False
    return row_scale(now, dense[:, stays])
