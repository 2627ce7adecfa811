"""Stores on servers that others run: Valkey, S3, Mooncake."""
