"""Offline: every chunk's KV, raw (right behind the prefix) and fused (behind its related chunks), into the store."""
