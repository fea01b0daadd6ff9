"""The whole line in a few lines: a model gets smaller, is checked, and becomes an ONNX file."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import depgraph
import exporters
import importance

config = ViTConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
)
model = ViTForImageClassification(config).eval()
inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}

graph = depgraph.trace(model, kwargs=inputs)
plan = graph.plan(importance.Magnitude(), depgraph.Target(params=0.7), scope="axis")
report = plan.apply_with_report()
print(report)

Path("out").mkdir(exist_ok=True)
print(exporters.to_onnx(report.model, (), "out/quickstart.onnx", inputs))
