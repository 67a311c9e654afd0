"""The requests of the OpenAI API as this server reads them, one module an area. Knows nothing of HTTP."""
