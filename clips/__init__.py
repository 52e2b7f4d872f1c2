"""From lists of clips to a cache: manifests, VIP-200K, writing."""

import common  # noqa: F401 (before torch: sets the wait policy of its threads)
