"""Shared memory that hosts lend each other: the stores that read, and the server that lends."""
