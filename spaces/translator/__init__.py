"""The Space's translator: a page, and an engine that keeps a ``llama-server`` answering it."""
