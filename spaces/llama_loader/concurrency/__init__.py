"""Work beside work: an iterator a thread ahead, a thread behind, a value that is on its way."""
