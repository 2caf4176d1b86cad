"""The inputs of a build: the data of ``build/``, and pinned files from outside."""
