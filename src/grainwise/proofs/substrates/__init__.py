"""Small models that several proofs train for themselves, in their own time."""
