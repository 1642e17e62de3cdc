"""Tuning: which workers, threads and batches serve one archive best on this machine."""
