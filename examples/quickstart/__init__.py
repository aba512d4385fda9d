"""A real multilingual corpus, a tokenizer and a small encoder made from nothing, then a whole run on them."""
