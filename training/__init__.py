"""Training of LoFA hypernetworks: data, losses, loops and evaluation (accelerate, diffusers, peft)."""
