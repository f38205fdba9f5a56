"""What budgets have spent: sums, thresholds, forecasts, and the files that all who meter share."""
