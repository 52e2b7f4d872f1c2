"""Errors in one line, typed checks, devices, files to pixels and back, ONNX operators.

This package is imported before torch, because OpenMP reads OMP_WAIT_POLICY once, when torch loads it. OpenMP's threads
spin while they wait, which keeps busy cores from other programs and from each other; PASSIVE lets them sleep.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# onnxruntime stores a device id under ~/.cache and sends usage events from the moment it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
