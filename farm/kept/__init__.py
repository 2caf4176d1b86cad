"""What a run leaves for the next one in ``.farm``: journals, trees, locks."""
