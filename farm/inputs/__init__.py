"""What a build is made from: the data of ``build/``, and pinned files from outside."""
