"""Normalisations: which dims they mix, and which dims their weights go with."""

from __future__ import annotations

from collections.abc import Iterable

from depgraph.graph import Value
from depgraph.rules.registry import Op, aten, rule

_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def _mix(op: Op, value: Value, dims: Iterable[int], how: str) -> None:
    for d in dims:
        op.relations.mix(value.dim(d), f"{how} averages over it")


@rule(
    *aten(
        """
        batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training
        """
    )
)
def batch_norm(op: Op) -> None:
    """In eval mode each channel is scaled by what is stored; in training mode batch and space are averaged over."""
    source = op["input"]
    op.relate("n c ..., c, c, c, c -> n c ...", source, *(op.get(name) for name in _OF_CHANNELS))
    if op.get("training"):
        _mix(op, source, [d for d in range(len(source.shape)) if d != 1], "batch norm in training mode")
    for saved in op.outputs[1:]:
        if saved.shape == source.shape[1:2]:
            op.relations.align(saved.dim(0), source.dim(1))


@rule("aten.instance_norm")
def instance_norm(op: Op) -> None:
    op.relate("n c ..., c, c, c, c -> n c ...", op["input"], *(op.get(name) for name in _OF_CHANNELS))
    if op["use_input_stats"]:
        _mix(op, op["input"], range(2, len(op.output.shape)), "instance norm")


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(op: Op) -> None:
    """x [n, g·c, ...]: the mean and variance of each of g groups mix its c channels and the space."""
    source, relations = op["input"], op.relations
    op.relate("n c ..., c, c -> n c ...", source, op.get("weight"), op.get("bias"))
    groups = op.get("num_groups") or op["group"]
    group, part = relations.new_dim(groups), relations.new_dim(source.shape[1] // groups)
    relations.fold(source.dim(1), [group, part])
    relations.mix(part, "group norm averages over it")
    _mix(op, source, range(2, len(source.shape)), "group norm")
    for saved in op.outputs[1:]:
        relations.align(saved.dim(0), source.dim(0))
        relations.align(saved.dim(1), group)


@rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(op: Op) -> None:
    """The trailing dims of `normalized_shape` are mixed; weight and bias have just these dims."""
    source = op["input"]
    for value in (op.get("weight"), op.get("bias"), *op.outputs):
        if value is not None:
            op.align_elementwise([source, value])
    how = op.target.split(".")[1].replace("_", " ").strip()
    _mix(op, source, range(-len(op["normalized_shape"]), 0), how)


@rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(op: Op) -> None:
    """w = g · v / ‖v‖, the norm over all dims but `dim` (over all of them when it is -1)."""
    direction, size = op["v"], op["g"]
    op.align_elementwise([direction, op.output])
    for value in [size, *op.outputs[1:]]:
        op.align_elementwise([value, direction])
    for d in range(len(direction.shape)):
        if d != op["dim"]:
            op.relations.mix(direction.dim(d), "weight norm takes the norm over it")
