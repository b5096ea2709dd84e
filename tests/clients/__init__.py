"""The libraries that people use, each in a process and an environment of its own, against a real server."""
