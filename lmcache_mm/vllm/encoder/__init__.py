"""The encoder connector's two sides."""
