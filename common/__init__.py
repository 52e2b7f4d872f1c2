"""What everything rests on: errors in one line, typed checks, devices, files to pixels and back, ONNX operators.

Importing this package before torch sets OMP_WAIT_POLICY. The threads of OpenMP spin while they wait for each other,
which costs little on idle cores but keeps other programs, and each other, from cores that are busy. PASSIVE lets them
sleep. OpenMP reads the variable once, when torch loads it; so commands and folders import this package first.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# onnxruntime stores a device id under ~/.cache and sends usage events from the moment it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
