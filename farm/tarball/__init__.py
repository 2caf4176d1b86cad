"""What is in a tarball: the parts of ``pack`` and ``release``."""
