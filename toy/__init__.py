"""The drawn world: people, scenes, captions, and tiny models of the released formats trained on it."""
