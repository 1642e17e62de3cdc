"""Federated training: the same loop at several clients, whose data stay where they are."""
