"""gguf-fleet: keep a fleet of quantized GGUF models current, measured and reversible."""

__version__ = "2026.11.0"
