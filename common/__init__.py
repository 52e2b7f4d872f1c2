"""What everything rests on: one-line errors, files to pixels and back, ONNX operators."""
