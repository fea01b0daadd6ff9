"""Single operators of ONNX, and what their rules should leave free.

A dim is written ``position.dim``: ``1.0`` is dimension 0 of the second operand. Every dim wider than one of an operand that
holds data must be free and exact, but for those in `fixed` and `mixed`. Operands are made of shapes; arrays are given as
they are (indices, axes, shapes), None leaves one out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper


@dataclass(frozen=True)
class Cast:
    """A stored tensor of floats that an operator reads as another type: 0, 1, 2, 3, 0 ..."""

    shape: tuple[int, ...]
    to: int

    def values(self) -> np.ndarray:
        return (np.arange(int(np.prod(self.shape))).reshape(self.shape) * 7 % 4).astype(np.float32)


@dataclass(frozen=True)
class Row:
    """One operator with operands and attributes; `name` is as in the table of rules, `without` are outputs that are left out."""

    name: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    fixed: str = ""
    mixed: str = ""
    opset: int = 17
    outputs: int = 1
    without: tuple[int, ...] = ()
    positive: bool = False

    def __str__(self) -> str:
        shapes = [getattr(o, "shape", o) if o is not None else "" for o in self.operands]
        return f"{self.name}({' '.join(map(str, shapes))}){self.opset}"

    def model(self) -> ir.Model:
        """A model of this one operator, whose operands are all stored."""
        generator = np.random.default_rng(7)
        names, held, casts = [], [], []
        for k, operand in enumerate(self.operands):
            if operand is None:
                names.append("")
                continue
            names.append(f"x{k}")
            if isinstance(operand, Cast):
                names[-1] = f"cast{k}"
                casts.append(helper.make_node("Cast", [f"x{k}"], [f"cast{k}"], to=operand.to))
                operand = operand.values()
            array = operand if isinstance(operand, np.ndarray) else self._drawn(operand, generator)
            held.append(numpy_helper.from_array(array, f"x{k}"))
        domain, _, kind = self.name.partition(".")
        outputs = ["" if k in self.without else f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(
            kind, names, outputs, domain="com.microsoft" if domain == "microsoft" else "", **self.attributes
        )
        results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
        graph = helper.make_graph([*casts, node], "row", [], results, held)
        sets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return ir.from_proto(helper.make_model(graph, opset_imports=sets, ir_version=10))

    def _drawn(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        drawn = generator.standard_normal(shape).astype(np.float32)
        return np.abs(drawn) + 1 if self.positive else drawn


def row(name: str, *operands: Any, **more: Any) -> Row:
    """A row; keywords that aren't fields of `Row` are attributes of the operator."""
    own = {key: more.pop(key) for key in ("fixed", "mixed", "opset", "outputs", "without", "positive") if key in more}
    return Row(name if "." in name else f"onnx.{name}", operands, more, **own)


def ints(*numbers: int) -> np.ndarray:
    """Whole numbers, as axes, shapes and indices are given."""
    return np.array(numbers, dtype=np.int64)


def bools(*shape: int) -> Cast:
    """A mask."""
    return Cast(shape, onnx.TensorProto.BOOL)


def scale() -> np.ndarray:
    """Of quantised numbers."""
    return np.array(0.1, np.float32)


def zero() -> np.ndarray:
    """The number that stands for zero."""
    return np.array(3, np.int8)


def whole(*shape: int) -> Cast:
    """Whole numbers that are data."""
    return Cast(shape, onnx.TensorProto.UINT32)


def bytes_(*shape: int) -> np.ndarray:
    """Quantised weights."""
    return (np.arange(int(np.prod(shape))).reshape(shape) * 37 % 101 - 50).astype(np.int8)


_UNARY = "Abs Atan Ceil Celu Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity IsNaN IsInf LeakyRelu Mish Neg Reciprocal \
Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Tan Tanh ThresholdedRelu Acosh Asinh Cosh Sqrt Log Dropout"
_BINARY = "Add Sub Mul Div Pow PRelu Equal Greater GreaterOrEqual Less LessOrEqual"

REDUCTIONS = [
    f"Reduce{name}" for name in ("Sum", "Mean", "Max", "Min", "Prod", "LogSumExp", "L1", "L2", "LogSum", "SumSquare")
]

ROWS = [
    *(row(name, (3, 4), positive=True, opset=18) for name in _UNARY.split()),
    *(row(name, np.full((3, 4), 0.5, np.float32) * (1 + np.arange(4, dtype=np.float32) / 9)) for name in ("Acos", "Asin", "Atanh")),
    *(row(name, (3, 4), (4,), positive=True) for name in _BINARY.split()),
    *(row(name, (3, 4), (4,), (3, 1)) for name in ("Max", "Min", "Sum", "Mean")),
    *(row(name, bools(3, 4), bools(4)) for name in ("And", "Or", "Xor")),
    row("Not", bools(3, 4)),
    row("Mod", (3, 4), (4,), positive=True, fmod=1),
    row("BitShift", whole(3, 4), whole(4), direction="LEFT"),
    *(row(name, whole(3, 4), whole(4), opset=18) for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    row("BitwiseNot", whole(3, 4), opset=18),
    row("Where", bools(3, 1), (3, 4), (4,)),
    row("Clip", (3, 4), np.array(-0.5, np.float32), None),
    row("Cast", (3, 4), to=11),
    row("CastLike", (3, 4), np.ones((), np.float64)),
    row("CastLike", (3, 4), np.ones(5, np.float64)),
    row("Gelu", (3, 4), opset=20),
    row("microsoft.Gelu", (3, 4)),
    row("microsoft.QuickGelu", (3, 4)),
    row("microsoft.FastGelu", (2, 3, 4), (4,)),
    row("microsoft.BiasGelu", (2, 3, 4), (4,)),
    row("MatMul", (3, 4), (4, 5)),
    row("MatMul", (2, 3, 4), (4, 5)),
    row("MatMul", (4,), (2, 4, 5)),
    row("Gemm", (3, 4), (4, 5), (5,)),
    row("Gemm", (4, 3), (5, 4), (3, 1), transA=1, transB=1, alpha=0.5),
    row("microsoft.FusedMatMul", (2, 4, 3), (2, 5, 4), transA=1, transB=1, alpha=0.5),
    row("microsoft.FusedGemm", (3, 4), (5, 4), (5,), transB=1, activation="Relu"),
    row("Einsum", (2, 3, 4), (2, 5, 4), equation="bij,bkj->bik"),
    row("Conv", (2, 4, 5, 5), (6, 4, 3, 3), (6,), fixed="0.2 0.3 1.2 1.3"),
    row("Conv", (2, 4, 9), (6, 2, 3), (6,), group=2, fixed="0.2 1.2"),
    row("Conv", (2, 4, 9), (6, 4, 1)),
    row("Conv", (2, 4, 9), (6, 4, 1), strides=[2], fixed="0.2"),
    row("Conv", (2, 4, 9), (6, 4, 1), pads=[0, 1], fixed="0.2"),
    row("ConvTranspose", (2, 4, 9), (4, 6, 1), strides=[1]),
    row("Conv", (2, 6, 5, 5), (6, 1, 3, 3), group=6, pads=[1, 1, 1, 1], fixed="0.2 0.3 1.2 1.3"),
    row("microsoft.FusedConv", (2, 4, 5, 5), (6, 4, 3, 3), (6,), activation="Relu", fixed="0.2 0.3 1.2 1.3"),
    row("ConvTranspose", (2, 4, 5, 5), (4, 6, 3, 3), (6,), strides=[2, 2], fixed="0.2 0.3 1.2 1.3"),
    row("ConvTranspose", (2, 4, 5), (4, 3, 3), (6,), group=2, fixed="0.2 1.2"),
    row("DeformConv", (2, 4, 5, 5), (6, 4, 3, 3), (2, 18, 3, 3), (6,), (2, 9, 3, 3), opset=19,
        fixed="0.2 0.3 1.2 1.3 2.1 2.2 2.3 4.1 4.2 4.3"),
    row("DeformConv", (2, 4, 5, 5), (6, 2, 3, 3), (2, 36, 3, 3), group=2, offset_group=2, opset=19,
        fixed="0.2 0.3 1.2 1.3 2.1 2.2 2.3"),
    row("DeformConv", (2, 6, 5, 5), (6, 1, 3, 3), (2, 18, 3, 3), group=6, opset=19, fixed="0.2 0.3 1.2 1.3 2.1 2.2 2.3"),
    row("BatchNormalization", (2, 4, 3), (4,), (4,), (4,), (4,), positive=True),
    row("InstanceNormalization", (2, 4, 3), (4,), (4,), mixed="0.2"),
    row("LayerNormalization", (2, 3, 4), (4,), (4,), mixed="0.2 1.0 2.0"),
    row("LayerNormalization", (2, 3, 4), (3, 4), axis=1, mixed="0.1 0.2 1.0 1.1"),
    row("LayerNormalization", (2, 3, 4), (3, 4), (3, 4), axis=1, opset=14, mixed="0.1 0.2 1.0 1.1 2.0 2.1"),
    row("GroupNormalization", (2, 6, 5), (6,), (6,), num_groups=3, opset=21, mixed="0.1 0.2 1.0 2.0"),
    row("microsoft.SkipLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), (4,), (4,), mixed="0.2 1.2 2.0 3.0 4.0"),
    row("microsoft.SkipSimplifiedLayerNormalization", (2, 3, 4), (2, 3, 4), (4,), (4,), mixed="0.2 1.2 2.0 3.0"),
    row("RMSNormalization", (2, 3, 4), (4,), opset=23, mixed="0.2 1.0"),
    row("MeanVarianceNormalization", (2, 3, 4, 5), mixed="0.0 0.2 0.3"),
    row("LpNormalization", (3, 4), mixed="0.1"),
    row("LRN", (2, 6, 3, 3), size=3, fixed="0.1"),
    row("Softmax", (2, 3, 4), axis=1, mixed="0.1"),
    row("Softmax", (2, 3, 4), opset=11, mixed="0.1 0.2"),
    row("LogSoftmax", (3, 4), mixed="0.1"),
    row("Hardmax", (3, 4), mixed="0.1"),
    row("MaxPool", (2, 4, 6, 6), kernel_shape=[2, 2], fixed="0.2 0.3"),
    row("AveragePool", (2, 4, 6), kernel_shape=[2], fixed="0.2"),
    row("LpPool", (2, 4, 6), kernel_shape=[2], fixed="0.2"),
    *(row(name, (2, 4, 6, 6), fixed="0.2 0.3") for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    row("Resize", (2, 4, 3, 3), None, np.array([1, 1, 2, 2], np.float32), fixed="0.2 0.3"),
    row("Resize", (2, 4, 3, 3), None, None, ints(2, 4, 6, 6), fixed="0.2 0.3"),
    row("Upsample", (2, 4, 3, 3), np.array([1, 1, 2, 2], np.float32), opset=9, fixed="0.2 0.3"),
    row("GridSample", (2, 4, 5, 5), (2, 3, 3, 2), fixed="0.2 0.3 1.1 1.2 1.3"),
    row("DepthToSpace", (2, 12, 3, 3), blocksize=2, fixed="0.2 0.3"),
    row("DepthToSpace", (2, 12, 3, 3), blocksize=2, mode="CRD", fixed="0.2 0.3"),
    row("SpaceToDepth", (2, 3, 4, 4), blocksize=2, fixed="0.2 0.3"),
    row("SpaceToDepth", (2, 3, 4, 4), blocksize=2, mode="CRD", fixed="0.2 0.3", opset=28),
    row("Reshape", (4, 6), ints(2, 2, 6)),
    row("Reshape", (4, 6), ints(0, 3, -1)),
    row("Flatten", (2, 3, 4)),
    row("Squeeze", (3, 1, 4), ints(1)),
    row("Unsqueeze", (3, 4), ints(1)),
    row("Unsqueeze", (3, 4), axes=[0], opset=11),
    row("Expand", (3, 1), ints(3, 4)),
    row("Tile", (3, 4), ints(2, 1)),
    row("Transpose", (2, 3, 4), perm=[2, 0, 1]),
    row("Concat", (2, 3), (2, 5), axis=1),
    row("Split", (2, 8), ints(3, 5), axis=1, outputs=2),
    row("Split", (2, 8), axis=1, outputs=2, opset=11),
    row("Split", (2, 9), axis=1, num_outputs=2, outputs=2, opset=18),
    row("Slice", (3, 8), ints(2), ints(6), ints(1)),
    row("Slice", (3, 8), ints(0, 1), ints(2, 7), ints(0, 1), ints(1, 2)),
    row("Slice", (3, 8), starts=[1], ends=[2147483647], axes=[1], opset=9),
    row("Pad", (3, 4), ints(0, 1, 0, 2)),
    row("Pad", (3, 4), ints(0, 1, 0, 2), mode="reflect", fixed="0.1"),
    row("Pad", (3, 4), pads=[1, 0, 0, 0], opset=10),
    row("Gather", (5, 4), ints(2, 0, 3)),
    row("Gather", (5, 4), ints(1, 0, 3, 2), axis=1),
    row("Gather", (5, 4), np.array(2), axis=0, fixed="0.0"),
    row("Gather", (5, 4), ints(2, 0, 3, 1).reshape(2, 2), fixed="0.0"),
    row("GatherElements", (3, 4), ints(*[k % 3 for k in range(12)]).reshape(3, 4), fixed="0.0"),
    row("GatherND", (3, 4, 5), ints(0, 2).reshape(2, 1), fixed="0.0"),
    row("ScatterElements", (5, 4), ints(*[k % 5 for k in range(8)]).reshape(2, 4), (2, 4), fixed="0.0 2.0"),
    row("ScatterND", (5, 4), ints(0, 3).reshape(2, 1), (2, 4), fixed="0.0 2.0"),
    row("OneHot", ints(0, 2, 1), np.array(4), np.array([0, 1], np.float32)),
    row("Trilu", (4, 5), fixed="0.0 0.1"),
    row("CumSum", (3, 4), np.array(1)),
    *(
        row(name, (2, 3, 4), axes=[1], keepdims=0, positive=True, mixed="" if name == "ReduceSum" else "0.1", opset=11)
        for name in REDUCTIONS
    ),
    row("ReduceSum", (2, 3, 4), ints(-1), opset=13),
    row("ReduceMean", (2, 3, 4), ints(0), opset=18, mixed="0.0"),
    row("ArgMax", (3, 4), axis=1, mixed="0.1"),
    row("ArgMin", (3, 4), axis=0, mixed="0.0"),
    row("TopK", (3, 6), ints(2), outputs=2, mixed="0.1"),
    row("LSTM", (5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32), hidden_size=4, outputs=3, fixed="0.0"),
    row("LSTM", (5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32), None, (2, 2, 4), (2, 2, 4), (2, 12), hidden_size=4,
        direction="bidirectional", outputs=3, fixed="0.0 1.0 2.0 3.0 5.0 6.0 7.0"),
    row("GRU", (5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24), hidden_size=4, linear_before_reset=1, outputs=2, fixed="0.0"),
    row("RNN", (5, 2, 3), (1, 4, 3), (1, 4, 4), (1, 8), hidden_size=4, outputs=2, fixed="0.0"),
    row("QuantizeLinear", (3, 4), np.array(0.1, np.float32), np.zeros((), np.uint8)),
    row("DequantizeLinear", bytes_(3, 4), np.array(0.1, np.float32), np.zeros((), np.int8)),
    row("DequantizeLinear", bytes_(3, 4), np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.int8), axis=0),
    row("DynamicQuantizeLinear", (3, 4), outputs=3, mixed="0.0 0.1"),
    row("ConvInteger", bytes_(2, 4, 5, 5).view(np.uint8), bytes_(6, 4, 3, 3), fixed="1.2 1.3"),
    row("MatMulInteger", bytes_(3, 4).view(np.uint8), bytes_(4, 5)),
    row("Attention", (2, 3, 12), (2, 5, 6), (2, 5, 8), q_num_heads=4, kv_num_heads=2, opset=23, fixed="0.1 1.1 2.1"),
    row("Attention", (2, 4, 3, 6), (2, 4, 5, 6), (2, 4, 5, 8), opset=23, fixed="0.2 1.2 2.2"),
    row("Attention", (2, 4, 3, 6), (2, 4, 5, 6), (2, 4, 5, 8), (2, 1, 3, 9), (2, 4, 4, 6), (2, 4, 4, 8), outputs=4, opset=23,
        fixed="0.2 1.2 2.2 3.2 3.3 4.2 5.2"),
    row("Attention", (2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 8), (4, 3, 5), opset=23, fixed="0.2 1.2 2.2 3.1 3.2"),
    row("Attention", (2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 8), outputs=4, without=(1, 2), opset=23, fixed="0.2 1.2 2.2"),
    row("microsoft.MultiHeadAttention", (2, 3, 12), (2, 5, 12), (2, 5, 8), num_heads=4, fixed="0.1 1.1 2.1"),
    row("microsoft.Attention", (2, 3, 8), (8, 36), (36,), num_heads=4, fixed="0.1"),
    row("microsoft.GroupQueryAttention", (2, 3, 32), (2, 3, 16), (2, 3, 16), None, None, np.array([2, 2], np.int32),
        np.array(3, np.int32), num_heads=4, kv_num_heads=2, outputs=3, fixed="0.0 0.1 1.0 1.1 2.0 2.1"),
    row("microsoft.GroupQueryAttention", (2, 3, 64), None, None, None, None, np.array([2, 2], np.int32), np.array(3, np.int32),
        num_heads=4, kv_num_heads=2, outputs=3, fixed="0.0 0.1"),
    row("microsoft.EmbedLayerNormalization", np.array([[0, 2, 1]], np.int32), None, (5, 8), (4, 8), None, (8,), (8,), outputs=2,
        mixed="2.1 3.1 5.0 6.0", fixed="2.0 3.0"),
    row("SimplifiedLayerNormalization", (2, 3, 4), (4,), mixed="0.2 1.0"),
    row("QLinearConv", bytes_(2, 4, 5, 5), scale(), zero(), bytes_(6, 4, 3, 3), scale(), zero(), scale(), zero(),
        fixed="3.2 3.3"),
    row("QLinearMatMul", bytes_(3, 4), scale(), zero(), bytes_(4, 5), scale(), zero(), scale(), zero()),
    row("ReverseSequence", (4, 3, 5), ints(2, 4, 3), fixed="0.0 0.1"),
    row("RoiAlign", (2, 4, 6, 6), np.array([[0, 0, 3, 3]], np.float32), ints(0), output_height=2, output_width=2,
        fixed="0.0 0.2 0.3 1.1"),
    row("NonZero", (3, 4), fixed="0.0 0.1"),
    row("RotaryEmbedding", (2, 4, 3, 8), (3, 4), (3, 4), ints(0, 1, 2, 0, 1, 2).reshape(2, 3), opset=23, fixed="*"),
    row("EyeLike", (3, 4), fixed="0.0 0.1"),
    row("RandomNormalLike", (3, 4), scale=1e-9, mean=0.5),
    row("RandomUniformLike", (3, 4), low=0.5, high=0.5),
    row("Bernoulli", (np.arange(12).reshape(3, 4) % 2).astype(np.float32)),
    row("Scatter", (5, 4), ints(*[k % 5 for k in range(8)]).reshape(2, 4), (2, 4), opset=10, fixed="0.0 2.0"),
    row("Swish", (3, 4), opset=24),
    row("Unique", (3, 4), axis=1, fixed="0.0 0.1"),
    row("Compress", (3, 4), np.array([True, False, True]), axis=0, fixed="0.0 0.1"),
    row("NonMaxSuppression", (1, 6, 4), (1, 2, 6), np.array(3), np.array(0.5, np.float32), np.array(0, np.float32),
        fixed="0.1 0.2 1.1 1.2"),
    row("DFT", (2, 4, 1), axis=1, fixed="0.0 0.1"),
    row("STFT", (1, 16, 1), np.array(4), None, np.array(8), fixed="0.1"),
    row("Det", (2, 3, 3), fixed="0.0 0.1 0.2"),
    row("Multinomial", (3, 4), sample_size=5, fixed="0.0 0.1"),
    row("MelWeightMatrix", np.array(4), np.array(8), np.array(16), np.array(0, np.float32), np.array(8, np.float32)),
    row("AffineGrid", (2, 2, 3), ints(2, 3, 4, 5), opset=20, fixed="0.0 0.1 0.2"),
    row("CenterCropPad", (6, 8), ints(4, 10), opset=18, fixed="0.0 0.1"),
    row("CenterCropPad", (6, 8), ints(4), axes=[1], opset=18, fixed="0.1"),
    row("Col2Im", (2, 12, 9), ints(4, 4), ints(2, 2), opset=18, fixed="0.0 0.1 0.2"),
    row("MaxUnpool", (1, 2, 2, 2), ints(*range(0, 32, 4)).reshape(1, 2, 2, 2), kernel_shape=[2, 2], strides=[2, 2],
        fixed="0.1 0.2 0.3"),
    row("MaxRoiPool", (2, 4, 6, 6), np.array([[0, 0, 0, 3, 3]], np.float32), pooled_shape=[2, 2], fixed="0.0 0.2 0.3 1.1"),
    row("microsoft.TransposeMatMul", (2, 4, 3), (2, 5, 4), transA=1, transB=1),
    row("microsoft.QuantizeLinear", (3, 4), np.array(0.1, np.float32), np.zeros((), np.uint8)),
    row("microsoft.DequantizeLinear", bytes_(3, 4), np.array(0.1, np.float32), np.zeros((), np.int8)),
    row("microsoft.RotaryEmbedding", (2, 4, 3, 8), ints(0, 1, 2, 0, 1, 2).reshape(2, 3), (3, 4), (3, 4),
        fixed="0.0 0.2 0.3 2.0 2.1 3.0 3.1"),
    *(row(name, (3, 4)) for name in ("Shape", "Size")),
    row("Range", np.array(0), np.array(5), np.array(1)),
    row("ConstantOfShape", ints(3, 4)),
    *(row(name, shape=[3, 4]) for name in ("RandomNormal", "RandomUniform")),
]  # fmt: skip
