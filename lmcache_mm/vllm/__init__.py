"""vLLM's connectors, which vLLM loads by module and class name: connector.py and encoder_connector.py."""
