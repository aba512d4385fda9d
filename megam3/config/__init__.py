"""The recipe's schema, its loading and its checks; imports nothing but pydantic and YAML."""
