"""vLLM's connector: see connector.py."""
