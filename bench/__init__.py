"""Measurements of the fleet itself: what it costs over the bare llama.cpp commands."""
