"""Engines: each gives a plan a place to run its steps in, and hands the products over."""
