"""Watching served models: alerts, the prediction log, drift, quality, and pages to look at."""
