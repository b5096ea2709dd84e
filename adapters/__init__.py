"""Adapters as files and rows: what they are, whether they are sound, and where they lie.

    inspection/   files -> Manifest, or the reason why not
    store/        blobs, the catalog of versions, archives
    database/     the rows of the whole service
    worker/       what runs inside vLLM's worker processes
    offline/      doctor, merge, reference answers: no server needed

Nothing here imports ``server``, ``fastapi`` or ``prometheus_client``.
"""
