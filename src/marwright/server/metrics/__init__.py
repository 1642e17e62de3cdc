"""What a server counts, on one endpoint: /metrics beside its health endpoints."""
