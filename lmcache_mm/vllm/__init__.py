"""vLLM's connectors, which it finds by module and class: connector.py and encoder_connector.py."""
