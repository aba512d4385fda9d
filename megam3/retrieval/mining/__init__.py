"""Hard negatives for training records: candidates from an index, filters, sampling, a report."""
