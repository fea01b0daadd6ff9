"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.decoder import DecoderReport, to_decoder_onnx
from exporters.dynamic import STATIC
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx

__all__ = [
    "STATIC",
    "DecoderReport",
    "Latency",
    "OnnxOptions",
    "OnnxReport",
    "compare_latency",
    "latency",
    "to_decoder_onnx",
    "to_onnx",
]
