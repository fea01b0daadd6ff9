"""A file of float32 becomes one of fewer bits, seen to compute nearly the same."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from depgraph.errors import ExportError, first_line
from exporters import onnx_file
from exporters.feeds import Distance, Feeds, as_feeds, distance
from exporters.onnx_check import open_session
from exporters.quietly import quietly

Kind = Literal["float16", "int8-dynamic", "int8-static", "int4"]

TOLERANCES: Mapping[str, float] = {"float16": 0.01, "int8-dynamic": 0.1, "int8-static": 0.15, "int4": 0.3}
"""The error (`Distance.error`) that each kind may have where `QuantOptions.tolerance` says nothing."""

QUANTISED_KEY = "depgraph.quantised"

_DYNAMIC = ["MatMul", "Gemm", "Gather", "LSTM"]  # dynamic convolutions are slower than those of float32
_LARGEST_BLOCK = 256


@dataclass(frozen=True)
class QuantOptions:
    """How to quantise.

    Attributes:
        kind: "float16": all values, inputs and outputs stay float32 (half the size; ONNX Runtime's CPU computes in
            float32). "int8-dynamic": weights of matrices, tables and LSTMs, activations while it runs. "int8-static": QDQ,
            unsigned activations calibrated on the data, weights per channel; the fastest for convolutions. "int4": weights
            of matrices in blocks (MatMulNBits), for language models.
        tolerance: Allowed `Distance.error` from the float file; None: that of `TOLERANCES`.
        block_size: For "int4": elements of a row that share a scale, a power of two from 16 to 256.
        exclude: Names of nodes that stay as they are.
        reduce_range: For int8: weights of 7 bits, which processors without VNNI need so as not to saturate.
    """

    kind: Kind
    tolerance: float | None = None
    block_size: int = 32
    exclude: tuple[str, ...] = ()
    reduce_range: bool = False


@dataclass(frozen=True)
class QuantReport:
    """What was written.

    Attributes:
        bytes: Size on disk, external data included; `bytes_before` of the float file.
        distance: From the float file, on the data.
        batches: How many batches of data were compared.
        operators: How many operators of each type became quantised ones.
        notes: What one should know.
    """

    path: Path
    kind: str
    bytes: int
    bytes_before: int
    distance: Distance
    batches: int
    operators: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        notes = "".join(f" Note: {note}." for note in self.notes)
        return (
            f"Wrote {self.path} ({self.kind}, {self.bytes:,} bytes, {self.bytes / self.bytes_before:.0%} of before) in "
            f"{self.seconds:.1f} s. Quantised: {counts or 'all values'}. Error on {self.batches} batches: "
            f"{self.distance.error:.2g} of the output.{notes}"
        )


@dataclass
class _Job:
    """One quantisation under way: `make` functions read `model` and `batches`, and write `draft`."""

    model: onnx.ModelProto
    batches: Sequence[Feeds]
    draft: Path
    options: QuantOptions
    notes: list[str] = field(default_factory=list)


def quantise(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: Iterable[Any] | None = None,
    *,
    options: QuantOptions,
) -> QuantReport:
    """Write the ONNX file `path` of float32 as `out` with fewer bits, compared in ONNX Runtime before it appears.

    Args:
        data: Batches to calibrate and compare on: mappings by input name, sequences in the inputs' order, or single arrays
            or tensors; all are kept in memory. None (not for "int8-static"): one random batch of small sizes.

    Raises:
        ExportError: The options or data make no sense, the file holds nothing of that kind to quantise or is quantised
            already, ONNX Runtime fails, or the error is beyond the tolerance. No file is left, one that was there stays.
    """
    source, target = Path(path), Path(out)
    if target.exists() and source.exists() and target.samefile(source):
        raise ExportError(f"{target} would take the place of the float file that it is made of: give it another name.")
    return _quantised(source, target, data, options)


def quantise_in_place(path: Path, data: Iterable[Any] | None, *, options: QuantOptions) -> QuantReport:
    """As `quantise`, of a file that isn't kept, whose place the new one takes."""
    return _quantised(path, path, data, options)


def _quantised(source: Path, target: Path, data: Iterable[Any] | None, options: QuantOptions) -> QuantReport:
    started = time.perf_counter()
    _check(options, data)
    original = open_session(source) if source.is_file() else _missing(source)
    batches = as_feeds(data, original)
    with onnx_file.staging(target) as draft, quietly():
        model = _loaded(source)
        before = Counter(node.op_type for node in model.graph.node)
        job = _Job(model, batches, draft, options)
        try:
            _MAKERS[options.kind](job)
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"onnxruntime's tools can't turn {source.name} into {options.kind} ({first_line(error)}); try another kind."
            ) from error
        operators = _gone(before, draft, options)
        _mark(draft, source, options.kind)
        found = distance(original, open_session(draft), batches)
        _require_near(found, options, source)
        written = onnx_file.publish(draft, target)
    size = _size(source)
    return QuantReport(
        target,
        options.kind,
        written,
        size,
        found,
        len(batches),
        operators,
        tuple(job.notes),
        time.perf_counter() - started,
    )


def _check(options: QuantOptions, data: Iterable[Any] | None) -> None:
    if options.kind not in _MAKERS:
        raise ExportError(f"kind={options.kind!r} is none of {', '.join(_MAKERS)}.")
    if options.kind == "int8-static" and data is None:
        raise ExportError(
            "int8-static is calibrated on real inputs: give `data`, some batches as the model will see them."
        )
    block = options.block_size
    if block < 16 or block > _LARGEST_BLOCK or block & (block - 1):
        raise ExportError(f"block_size={block} can't be: MatMulNBits takes powers of two from 16 to {_LARGEST_BLOCK}.")


def _missing(source: Path) -> Any:
    raise ExportError(f"There is no file {source} to quantise.")


def _loaded(source: Path) -> onnx.ModelProto:
    """The model without types of weights among those of values, over which onnxruntime's quantisers stumble."""
    model = onnx.load(source)
    odd = {"QuantizeLinear", "DequantizeLinear", "MatMulNBits", "DynamicQuantizeLinear"}
    if found := sorted(odd & {node.op_type for node in model.graph.node}):
        raise ExportError(f"{source.name} is quantised already (it has {found[0]}): give the float file.")
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


def _float16(job: _Job) -> None:
    made = convert_float_to_float16(job.model, keep_io_types=True, node_block_list=list(job.options.exclude))
    OnnxModel.graph_topological_sort(made.graph)  # casts stand at the end, where ONNX wants them before what reads them
    _save(made, job.draft)


def _int8_dynamic(job: _Job) -> None:
    if any(node.op_type == "Conv" for node in job.model.graph.node):
        job.notes.append("convolutions stay float32, as dynamic ones are slower: int8-static quantises them")
    quantization.quantize_dynamic(
        job.model,
        job.draft,
        op_types_to_quantize=_DYNAMIC,
        per_channel=True,
        reduce_range=job.options.reduce_range,
        nodes_to_exclude=list(job.options.exclude),
    )


class _Reader(quantization.CalibrationDataReader):
    """The batches, one after the other."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        """The next batch; None at the end."""
        return next(self._left, None)


def _int8_static(job: _Job) -> None:
    quantization.quantize_static(
        _folded(job),
        job.draft,
        _Reader(job.batches),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=job.options.reduce_range,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=list(job.options.exclude),
    )


def _folded(job: _Job) -> Path:
    """The model with constants computed and norms in the convolutions before them, in the draft's folder."""
    plain, folded = job.draft.with_name("plain.onnx"), job.draft.with_name("folded.onnx")
    _save(job.model, plain)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(folded)
    settings.log_severity_level = 4
    onnxruntime.InferenceSession(str(plain), settings, providers=["CPUExecutionProvider"])
    return folded


def _int4(job: _Job) -> None:
    made = MatMulNBitsQuantizer(
        job.model, 4, job.options.block_size, is_symmetric=True, nodes_to_exclude=list(job.options.exclude)
    )
    made.process()
    blocks = [node for node in made.model.model.graph.node if node.op_type == "MatMulNBits"]
    rows = [attribute.i for node in blocks for attribute in node.attribute if attribute.name == "K"]
    ragged = sorted({row for row in rows if row % job.options.block_size})
    if ragged:
        job.notes.append(
            f"rows of {', '.join(map(str, ragged))} are padded to blocks of {job.options.block_size}: pruning with round_to="
            f"{job.options.block_size} spares that"
        )
    _save(made.model.model, job.draft)


_MAKERS: dict[str, Callable[[_Job], None]] = {
    "float16": _float16,
    "int8-dynamic": _int8_dynamic,
    "int8-static": _int8_static,
    "int4": _int4,
}


def _save(model: onnx.ModelProto, draft: Path) -> None:
    large = model.ByteSize() > onnx_file.INLINE_LIMIT
    with onnx_file.writing(draft.parent.parent / draft.name):
        onnx.save(
            model, draft, save_as_external_data=large, location=onnx_file.data_path(draft).name if large else None
        )


_MADE = {"MatMulNBits", "MatMulInteger", "DynamicQuantizeLSTM", "QuantizeLinear", "DequantizeLinear", "ConvInteger"}


def _gone(before: Counter[str], draft: Path, options: QuantOptions) -> dict[str, int]:
    """How many operators were replaced by, or feed on, quantised ones; an error if none was."""
    graph = onnx.load(draft, load_external_data=False).graph
    if options.kind == "float16":
        return {}
    if not any(node.op_type in _MADE for node in graph.node):
        raise ExportError(
            f"The file holds nothing that {options.kind} quantises (such as a MatMul with constant weights); try another kind."
        )
    if options.kind != "int8-static":
        after = Counter(node.op_type for node in graph.node)
        return {name: before[name] - after[name] for name in before if name in _DYNAMIC and before[name] > after[name]}
    made = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    fed = Counter(n.op_type for n in graph.node if n.op_type != "QuantizeLinear" and made & set(n.input))
    return dict(sorted(fed.items()))


def _mark(draft: Path, source: Path, kind: str) -> None:
    """Keep what the float file says of itself, and say what was done to it."""
    held = onnx.load(source, load_external_data=False)
    made = onnx.load(draft, load_external_data=False)
    props = {prop.key: prop.value for prop in held.metadata_props} | {QUANTISED_KEY: kind}
    del made.metadata_props[:]
    onnx.helper.set_model_props(made, props)
    made.producer_name, made.producer_version = held.producer_name, held.producer_version
    with onnx_file.writing(draft.parent.parent / draft.name):
        onnx.save(made, draft)


def _require_near(found: Distance, options: QuantOptions, source: Path) -> None:
    allowed = TOLERANCES[options.kind] if options.tolerance is None else options.tolerance
    if not found.error <= allowed:
        worst = max(found.outputs, key=lambda name: found.outputs[name])
        raise ExportError(
            f"{source.name} as {options.kind} has an error of {found.error:.2g} at output {worst!r}, where {allowed:.2g} is "
            "allowed; not written: take another kind, exclude nodes, give more data, or raise QuantOptions.tolerance (--tolerance)."
        )


def _size(path: Path) -> int:
    data = onnx_file.data_path(path)
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
