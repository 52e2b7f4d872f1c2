"""Speed and memory beside the device's own limits."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
