"""Conditions: what personalises a LoRA (text so far), encoded as a token sequence [1, S, d]."""
