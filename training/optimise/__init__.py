"""Optimising a trained network: variants of it, built, measured, compared, and one chosen."""
