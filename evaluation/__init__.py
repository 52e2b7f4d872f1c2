"""What scores videos: cases, metrics, VBench, tables."""
