"""A model measured on held-out tasks: protocols, metrics, statistics, records, report."""
