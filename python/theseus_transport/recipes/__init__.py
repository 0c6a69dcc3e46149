"""From cross-moments to maps and scales, and what is fitted behind them: `effect`, `coherent` and `paper`."""
