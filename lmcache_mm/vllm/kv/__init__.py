"""The KV connector's scheduler and worker sides."""
