"""The text, images and tensors both models are run on."""
