"""Fetches, verifies and runs ``llama-server``: host facts, choice, bytes, files, a server.

The loader runs alone from the root of a Space and imports nothing of the farm. Import its modules
by name: this file imports nothing, so that ``python3 -m llama_loader --help`` costs nothing.
"""

__version__ = "1.0.0"
