"""Training: data, models, the loop, and the run folder they leave."""
