"""How bytes come here: sources, connections, mirrors, chunks, and what is kept of them."""
