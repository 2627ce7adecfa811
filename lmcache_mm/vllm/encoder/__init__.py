"""The encoder connector's scheduler and worker sides."""
