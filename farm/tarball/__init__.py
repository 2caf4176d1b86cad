"""The content of a tarball: modules of ``pack`` and ``release``."""
