"""The service: summaries and scores over HTTP from a run's policies and its reward model."""
