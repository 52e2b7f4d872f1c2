"""What everything rests on: one-line errors, files to pixels and back, the ONNX reader of face recognizers."""

import os

# onnxruntime's packages store a device id under ~/.cache and send usage events from the moment they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
