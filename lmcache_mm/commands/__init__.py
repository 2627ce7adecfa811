"""The commands of `lmcache-mm`."""
