"""The pure part of LoFA: target layers, LoRAs, response maps and the hypernetwork, on torch alone."""

__version__ = "0.1.0"
