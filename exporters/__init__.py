"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.dynamic import STATIC
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx
from exporters.timing.comparing import Compared, predicted_and_measured
from exporters.timing.kit import write_kit
from exporters.timing.model import MeasuredLatency, onnx_graph
from exporters.timing.profile import Profile, measured_profile

__all__ = [
    "STATIC",
    "Compared",
    "Latency",
    "MeasuredLatency",
    "OnnxOptions",
    "OnnxReport",
    "Profile",
    "compare_latency",
    "latency",
    "measured_profile",
    "onnx_graph",
    "predicted_and_measured",
    "to_onnx",
    "write_kit",
]
