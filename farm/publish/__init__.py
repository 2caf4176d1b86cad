"""A release folder → where loaders read it: a folder, GitHub Releases, or the Hub."""
