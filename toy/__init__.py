"""The drawn world: people, scenes, captions, and tiny models of the released formats trained on it."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
