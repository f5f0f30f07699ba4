"""What a model would do on hardware that one doesn't have: predicted, never measured."""
