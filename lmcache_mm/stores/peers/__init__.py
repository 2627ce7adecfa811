"""Hosts read each other's shared memory: the stores that read it, and the server that lends it."""
