"""What things cost, as ratios within one run: each beside its baseline."""
