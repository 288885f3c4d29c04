"""What a model is worth at each depth: accuracy, cost, tables and plots."""
