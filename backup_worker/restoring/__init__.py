"""Putting files back: one agent's restore, ordered or by hand, the approved state, and the proof that it works."""
