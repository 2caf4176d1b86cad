"""The same again: built twice, or from a published ``BUILD.json``, and compared."""
