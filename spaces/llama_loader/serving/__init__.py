"""What a running server needs and says: arguments, sockets, its log, its exit status."""
