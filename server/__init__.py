"""HTTP only: an OpenAI-compatible server in front of `fusionrag.rag`. Never touches tensors."""
