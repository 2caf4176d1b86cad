"""Engines: each runs a plan somewhere and returns the tree that it made."""
