"""What a step computes: one file per training stage, all behind the protocol in base.py."""
