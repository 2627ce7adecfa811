"""Stores on external servers: Valkey, S3, Mooncake."""
