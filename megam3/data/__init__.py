"""Text in, packed batches out: records, tokenised store, batch plan, loader."""
