"""gguf-fleet: keep a fleet of quantized GGUF models current, measured and reversible."""

__version__ = "1.0.0"
