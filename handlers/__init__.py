"""Handlers that run on a stock TorchServe: each file stands here as it stands inside an archive.

Their siblings are imported by bare name, so import them as a worker does (this folder on the path),
or find them as files with `importlib.resources.files("marwright.handlers")`.
"""
