"""What a model is: families as data, its geometry, its tensors by canonical name, one forward pass."""
