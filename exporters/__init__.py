"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.decoder import DecoderReport, decoder_feeds, to_decoder_onnx
from exporters.dynamic import STATIC
from exporters.encoder_decoder import EncoderDecoderReport, to_encoder_decoder_onnx
from exporters.executorch_export import ExecuTorchOptions, to_executorch
from exporters.genai import GenaiOptions, GenaiReport, to_genai
from exporters.gguf_export import GgufOptions, to_gguf
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx
from exporters.openvino_export import OpenVinoOptions, to_openvino
from exporters.ort_format import OrtReport, to_ort
from exporters.quantising import QuantOptions, QuantReport, quantise
from exporters.timing.comparing import Compared, predicted_and_measured
from exporters.timing.kit import write_kit
from exporters.timing.model import MeasuredLatency, onnx_graph
from exporters.timing.profile import Profile, measured_profile
from exporters.verifying import FileReport

__all__ = [
    "Compared",
    "DecoderReport",
    "EncoderDecoderReport",
    "ExecuTorchOptions",
    "FileReport",
    "GenaiOptions",
    "GenaiReport",
    "GgufOptions",
    "Latency",
    "MeasuredLatency",
    "OnnxOptions",
    "OnnxReport",
    "OpenVinoOptions",
    "OrtReport",
    "Profile",
    "QuantOptions",
    "QuantReport",
    "STATIC",
    "compare_latency",
    "decoder_feeds",
    "latency",
    "measured_profile",
    "onnx_graph",
    "predicted_and_measured",
    "quantise",
    "to_decoder_onnx",
    "to_encoder_decoder_onnx",
    "to_executorch",
    "to_genai",
    "to_gguf",
    "to_onnx",
    "to_openvino",
    "to_ort",
    "write_kit",
]
