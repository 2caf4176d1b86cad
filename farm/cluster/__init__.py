"""Sets on many hosts: what is handed out, and what a host does with it."""
