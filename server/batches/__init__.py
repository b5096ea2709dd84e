"""Batches: files of requests that are answered while the server has nothing better to do."""
