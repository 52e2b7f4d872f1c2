"""What runs a training: processes, state, optimizer, log, plan, adapters, memory."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
