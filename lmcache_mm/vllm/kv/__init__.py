"""The KV connector's two sides."""
