"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.dynamic import STATIC
from exporters.executorch_export import ExecuTorchOptions, to_executorch
from exporters.gguf_export import GgufOptions, to_gguf
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx
from exporters.openvino_export import OpenVinoOptions, to_openvino
from exporters.verifying import FileReport

__all__ = [
    "STATIC",
    "ExecuTorchOptions",
    "FileReport",
    "GgufOptions",
    "Latency",
    "OnnxOptions",
    "OnnxReport",
    "OpenVinoOptions",
    "compare_latency",
    "latency",
    "to_executorch",
    "to_gguf",
    "to_onnx",
    "to_openvino",
]
