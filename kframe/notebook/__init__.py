"""What notebooks show: a pipeline's page, live panels, live results."""
