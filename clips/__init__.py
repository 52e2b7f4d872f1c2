"""From lists of clips to a cache: manifests, VIP-200K, writing."""
