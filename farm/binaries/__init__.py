"""What a binary holds: the parts of ``elf``."""
