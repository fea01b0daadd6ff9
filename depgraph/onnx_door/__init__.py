"""The second door: ONNX files, captured, cut, checked and written without PyTorch modules."""
