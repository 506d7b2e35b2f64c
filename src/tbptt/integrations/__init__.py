"""Other libraries: each in a room of its own, imported by nobody, so that none of them is needed."""
