"""Orthogonal Procrustes in float64: the map of a cross-moment, and its certificate."""
