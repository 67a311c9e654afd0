"""The answers of the OpenAI API as this server spells them, one module an area. Knows nothing of HTTP."""
