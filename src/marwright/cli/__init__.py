"""The command line: parses and prints; the work is done below it. The one place that sees all."""
