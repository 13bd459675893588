"""What a hypernetwork has to beat."""
