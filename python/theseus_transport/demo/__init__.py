"""The experiment of the README's picture."""
