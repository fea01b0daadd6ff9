"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.dynamic import STATIC
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx

__all__ = ["STATIC", "Latency", "OnnxOptions", "OnnxReport", "compare_latency", "latency", "to_onnx"]
