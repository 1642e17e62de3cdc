"""The gateway: an nginx in front of TorchServe that splits a model's traffic between versions."""
