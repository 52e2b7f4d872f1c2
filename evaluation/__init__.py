"""What scores videos: cases, metrics, VBench, tables."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
