"""The vision models of the zoo: how each is trained and measured, one file a model."""
