"""What of a server's configuration is weak: `marwright harden`."""
