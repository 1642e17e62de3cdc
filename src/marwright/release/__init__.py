"""Releases: moving traffic from one version of a model to the next, with gates, and back."""
