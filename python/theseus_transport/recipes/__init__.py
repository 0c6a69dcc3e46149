"""From cross-moments to maps and scales: `coherent` and `paper`."""
