"""Loraplex: one base model, many customers, each answered by their own adapter."""

__version__ = "0.1.0"
