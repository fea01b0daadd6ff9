"""The last step: a model leaves as a file that another runtime has been seen to run rightly."""

from exporters.decoder import DecoderReport, decoder_feeds, to_decoder_onnx
from exporters.dynamic import STATIC
from exporters.encoder_decoder import EncoderDecoderReport, to_encoder_decoder_onnx
from exporters.genai import GenaiOptions, GenaiReport, to_genai
from exporters.latency import Latency, compare_latency, latency
from exporters.onnx_export import OnnxOptions, OnnxReport, to_onnx
from exporters.ort_format import OrtReport, to_ort
from exporters.quantising import QuantOptions, QuantReport, quantise

__all__ = [
    "STATIC",
    "DecoderReport",
    "EncoderDecoderReport",
    "GenaiOptions",
    "GenaiReport",
    "Latency",
    "OnnxOptions",
    "OnnxReport",
    "OrtReport",
    "QuantOptions",
    "QuantReport",
    "compare_latency",
    "decoder_feeds",
    "latency",
    "quantise",
    "to_decoder_onnx",
    "to_encoder_decoder_onnx",
    "to_genai",
    "to_onnx",
    "to_ort",
]
