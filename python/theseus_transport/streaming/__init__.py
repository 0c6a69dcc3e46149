"""Models larger than memory: both run block by block, maps made and used on the way."""
