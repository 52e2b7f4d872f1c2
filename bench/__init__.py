"""Speed and memory beside the device's own limits."""
