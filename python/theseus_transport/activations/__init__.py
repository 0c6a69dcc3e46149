"""What two models show of the same tokens: which spaces and tokens correspond, hooks, cross-moments."""
