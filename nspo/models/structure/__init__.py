"""What a model is made of: its linear layers, their inputs, fused experts, and how much of it is covered."""
