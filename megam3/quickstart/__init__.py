"""Everything the quickstart needs before training: a real multilingual corpus, a tokenizer and a small encoder."""
