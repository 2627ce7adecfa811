"""Stores in this host's memory and on its disks."""
