"""All maps between two bases: made, saved, loaded, judged."""
