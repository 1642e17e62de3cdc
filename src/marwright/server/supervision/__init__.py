"""The supervisor: one server started, watched, mended and stopped; how others ask it."""
