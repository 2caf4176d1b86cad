"""Engines: each makes a workspace for a plan's steps, and returns the products."""
