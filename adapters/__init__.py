"""The registry: which adapters exist, whose they are, and where their bytes lie.

Nothing here imports ``server``, ``fastapi`` or ``prometheus_client``.
"""
